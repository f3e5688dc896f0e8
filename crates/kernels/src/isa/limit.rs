//! Multiplying as fast as a processor can: one instruction on registers, over and over.

use std::arch::asm;
use std::time::Instant;

use super::amx;

/// Operations of a round of a loop, an addition and a multiplication each counted.
pub(crate) struct Loop {
    pub(crate) instruction: &'static str,
    pub(crate) operations: f64,
    run: fn(usize),
}

impl Loop {
    /// So many rounds.
    pub(crate) fn run(&self, rounds: usize) {
        (self.run)(rounds);
    }

    pub(crate) fn f32() -> Option<Self> {
        is_x86_feature_detected!("avx512f").then_some(Self {
            instruction: "vfmadd231ps zmm",
            operations: 12.0 * 32.0,
            // SAFETY: the processor has the instruction.
            run: |rounds| unsafe { f32(rounds) },
        })
    }

    pub(crate) fn bf16() -> Option<Self> {
        if amx::Amx::detect().is_some() {
            return Some(Self {
                instruction: "tdpbf16ps",
                operations: 4.0 * 2.0 * 16.0 * 16.0 * 32.0,
                run: tiles_bf16,
            });
        }
        is_x86_feature_detected!("avx512bf16").then_some(Self {
            instruction: "vdpbf16ps zmm",
            operations: 12.0 * 64.0,
            // SAFETY: the processor has the instruction.
            run: |rounds| unsafe { bf16(rounds) },
        })
    }

    pub(crate) fn bytes() -> Option<Self> {
        if amx::has_bytes() {
            return Some(Self {
                instruction: "tdpbssd",
                operations: 4.0 * 2.0 * 16.0 * 16.0 * 64.0,
                run: tiles_of_bytes,
            });
        }
        is_x86_feature_detected!("avx512vnni").then_some(Self {
            instruction: "vpdpbusd zmm",
            operations: 12.0 * 128.0,
            // SAFETY: the processor has the instruction.
            run: |rounds| unsafe { bytes(rounds) },
        })
    }
}

/// Cycles a second of this thread.
pub(crate) fn clock() -> f64 {
    const ROUNDS: usize = 1 << 20;
    let started = Instant::now();
    // SAFETY: works on registers alone, all of which it names.
    unsafe {
        asm!(
            "2:",
            "add {sum}, {rounds}", "add {sum}, {rounds}", "add {sum}, {rounds}", "add {sum}, {rounds}",
            "add {sum}, {rounds}", "add {sum}, {rounds}", "add {sum}, {rounds}", "add {sum}, {rounds}",
            "dec {rounds}",
            "jnz 2b",
            rounds = inout(reg) ROUNDS => _,
            sum = inout(reg) 0usize => _,
            options(nostack, nomem),
        );
    }
    8.0 * ROUNDS as f64 / started.elapsed().as_secs_f64()
}

/// Twelve independent registers of sums.
macro_rules! twelve {
    ($name:ident, $feature:literal, $instruction:literal) => {
        #[target_feature(enable = $feature)]
        fn $name(rounds: usize) {
            // SAFETY: works on registers alone, all of which it names; the features are enabled.
            unsafe {
                asm!(
                    "vpxord zmm30, zmm30, zmm30",
                    "vpxord zmm31, zmm31, zmm31",
                    "2:",
                    concat!($instruction, " zmm0, zmm30, zmm31"),
                    concat!($instruction, " zmm1, zmm30, zmm31"),
                    concat!($instruction, " zmm2, zmm30, zmm31"),
                    concat!($instruction, " zmm3, zmm30, zmm31"),
                    concat!($instruction, " zmm4, zmm30, zmm31"),
                    concat!($instruction, " zmm5, zmm30, zmm31"),
                    concat!($instruction, " zmm6, zmm30, zmm31"),
                    concat!($instruction, " zmm7, zmm30, zmm31"),
                    concat!($instruction, " zmm8, zmm30, zmm31"),
                    concat!($instruction, " zmm9, zmm30, zmm31"),
                    concat!($instruction, " zmm10, zmm30, zmm31"),
                    concat!($instruction, " zmm11, zmm30, zmm31"),
                    "dec {rounds}",
                    "jnz 2b",
                    rounds = inout(reg) rounds.max(1) => _,
                    out("zmm0") _, out("zmm1") _, out("zmm2") _, out("zmm3") _,
                    out("zmm4") _, out("zmm5") _, out("zmm6") _, out("zmm7") _,
                    out("zmm8") _, out("zmm9") _, out("zmm10") _, out("zmm11") _,
                    out("zmm30") _, out("zmm31") _,
                    options(nostack, nomem),
                );
            }
        }
    };
}

twelve!(f32, "avx512f", "vfmadd231ps");
twelve!(bf16, "avx512f,avx512bf16", "vdpbf16ps");
twelve!(bytes, "avx512f,avx512vnni", "vpdpbusd");

/// Four independent tiles of sums.
macro_rules! tiles {
    ($name:ident, $instruction:literal) => {
        fn $name(rounds: usize) {
            let Some(amx) = amx::Amx::detect() else {
                return;
            };
            let _tiles = amx.tiles();
            // SAFETY: works on tile registers alone, which are configured until `_tiles` is dropped.
            unsafe {
                asm!(
                    "tilezero tmm4",
                    "tilezero tmm5",
                    "tilezero tmm6",
                    "tilezero tmm7",
                    "2:",
                    concat!($instruction, " tmm0, tmm4, tmm6"),
                    concat!($instruction, " tmm1, tmm4, tmm7"),
                    concat!($instruction, " tmm2, tmm5, tmm6"),
                    concat!($instruction, " tmm3, tmm5, tmm7"),
                    "dec {rounds}",
                    "jnz 2b",
                    rounds = inout(reg) rounds.max(1) => _,
                    out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
                    out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
                    options(nostack, nomem),
                );
            }
        }
    };
}

tiles!(tiles_bf16, "tdpbf16ps");
tiles!(tiles_of_bytes, "tdpbssd");
