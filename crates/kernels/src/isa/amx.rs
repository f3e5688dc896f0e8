//! Tiles of bf16 (AMX-BF16): eight registers of 16 rows of 64 bytes, multiplied as matrices.
//!
//! The instructions are written as assembly, since their intrinsics are not stable.

use std::arch::asm;
use std::marker::PhantomData;
use std::sync::OnceLock;

use crate::product::layout::{InputChunk, Sums, WeightChunk};

/// Proof that this processor has AMX-BF16 and that the system lets this program use it.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Amx(());

/// Rows of a weight that a [`Tiles::multiply`] takes: two registers.
pub(crate) const ROWS: usize = 32;

impl Amx {
    pub(crate) fn detect() -> Option<Self> {
        static FOUND: OnceLock<bool> = OnceLock::new();
        FOUND.get_or_init(is_there).then_some(Self(()))
    }

    /// Configures the tile registers of this thread.
    #[inline(always)]
    pub(crate) fn tiles(self) -> Tiles {
        #[repr(C, align(64))]
        struct Configuration {
            palette: u8,
            start_row: u8,
            reserved: [u8; 14],
            bytes_per_row: [u16; 16],
            rows: [u8; 16],
        }
        /// Eight registers of 16 rows of 64 bytes (Intel SDM, volume 1, 18.2).
        static CONFIGURATION: Configuration = Configuration {
            palette: 1,
            start_row: 0,
            reserved: [0; 14],
            bytes_per_row: [64, 64, 64, 64, 64, 64, 64, 64, 0, 0, 0, 0, 0, 0, 0, 0],
            rows: [16, 16, 16, 16, 16, 16, 16, 16, 0, 0, 0, 0, 0, 0, 0, 0],
        };
        // SAFETY: the processor has AMX and the system allows it (`self`); the 64 bytes that are read
        // are a valid configuration of palette 1.
        unsafe {
            asm!("ldtilecfg [{}]", in(reg) &CONFIGURATION, options(nostack, preserves_flags, readonly));
        }
        Tiles {
            of_this_thread: PhantomData,
        }
    }
}

/// Tile registers that are configured; released when dropped.
pub(crate) struct Tiles {
    of_this_thread: PhantomData<*const ()>,
}

impl Tiles {
    /// `sums (+)= weight · input`, over all chunks. The input, which other rows of the weight meet next, stays
    /// in the first cache; the weight does not, and what lies behind the sums is fetched into it.
    ///
    /// # Panics
    /// If there are not as many chunks of the input as of the weight.
    #[inline(always)]
    pub(crate) fn multiply(
        &self,
        weight: &[WeightChunk<ROWS>],
        input: &[InputChunk],
        sums: &mut Sums<ROWS>,
        adds: bool,
    ) {
        assert_eq!(weight.len(), input.len());
        // SAFETY: the registers are configured as 16 rows of 64 bytes (`self` exists on this thread only
        // while they are). `sums` is 32 rows of 128 bytes: each of its four quarters is 16 rows, 128
        // bytes apart, of 64 bytes. Every round reads one chunk of either operand, 2048 bytes (32 rows of
        // 64; 16 of 128), and there are as many rounds as chunks. Fetching changes nothing, wherever it is.
        unsafe {
            asm!(
                "test {adds:e}, {adds:e}",
                "jz 2f",
                "tileloadd tmm0, [{c} + {sb}]",
                "tileloadd tmm1, [{c} + {sb} + 64]",
                "tileloadd tmm2, [{c} + {sb} + 2048]",
                "tileloadd tmm3, [{c} + {sb} + 2112]",
                "jmp 3f",
                "2:",
                "tilezero tmm0",
                "tilezero tmm1",
                "tilezero tmm2",
                "tilezero tmm3",
                "3:",
                "test {n}, {n}",
                "jz 5f",
                "4:",
                "tileloadd tmm6, [{b} + {sb}]",
                "tileloaddt1 tmm4, [{a} + {sa}]",
                "tileloadd tmm7, [{b} + {sb} + 64]",
                "tdpbf16ps tmm0, tmm4, tmm6",
                "tileloaddt1 tmm5, [{a} + {sa} + 1024]",
                "tdpbf16ps tmm1, tmm4, tmm7",
                "prefetchw [{next}]",
                "prefetchw [{next} + 64]",
                "prefetchw [{next} + 128]",
                "prefetchw [{next} + 192]",
                "tdpbf16ps tmm2, tmm5, tmm6",
                "tdpbf16ps tmm3, tmm5, tmm7",
                "add {a}, 2048",
                "add {b}, 2048",
                "add {next}, 256",
                "dec {n}",
                "jnz 4b",
                "5:",
                "tilestored [{c} + {sb}], tmm0",
                "tilestored [{c} + {sb} + 64], tmm1",
                "tilestored [{c} + {sb} + 2048], tmm2",
                "tilestored [{c} + {sb} + 2112], tmm3",
                a = inout(reg) weight.as_ptr() => _,
                b = inout(reg) input.as_ptr() => _,
                n = inout(reg) weight.len() => _,
                next = inout(reg) sums.0.as_ptr().wrapping_add(ROWS) => _,
                c = in(reg) sums.0.as_mut_ptr(),
                adds = in(reg) u32::from(adds),
                sa = in(reg) 64usize,
                sb = in(reg) 128usize,
                out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
                out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
                options(nostack),
            );
        }
    }
}

impl Drop for Tiles {
    fn drop(&mut self) {
        // SAFETY: this thread has configured its registers.
        unsafe { asm!("tilerelease", options(nostack, preserves_flags, nomem)) }
    }
}

/// Whether there are products of bytes (AMX-INT8), too.
pub(crate) fn has_bytes() -> bool {
    use std::arch::x86_64::__cpuid_count;
    Amx::detect().is_some() && __cpuid_count(7, 0).edx & 1 << 25 != 0
}

/// Whether processor and system have tiles, and this program may use them.
#[cfg(target_os = "linux")]
fn is_there() -> bool {
    use std::arch::x86_64::{__cpuid, __cpuid_count, _xgetbv};

    /// AMX-BF16 and AMX-TILE in EDX of leaf 7.
    const NEEDED: u32 = 1 << 22 | 1 << 24;
    /// The state of tiles in XCR0.
    const STATE: u64 = 0b11 << 17;
    const ARCH_REQ_XCOMP_PERM: usize = 0x1023;
    const XFEATURE_XTILEDATA: usize = 18;
    #[target_feature(enable = "xsave")]
    fn enabled() -> u64 {
        // SAFETY: register 0 exists wherever the instruction does.
        unsafe { _xgetbv(0) }
    }
    let has_xsave = __cpuid(1).ecx & 1 << 27 != 0;
    if !has_xsave || __cpuid(0).eax < 7 || __cpuid_count(7, 0).edx & NEEDED != NEEDED {
        return false;
    }
    // SAFETY: the system has turned XSAVE on (OSXSAVE).
    if unsafe { enabled() } & STATE != STATE {
        return false;
    }
    // SAFETY: asks for a permission and touches no memory; an old kernel answers with an error.
    unsafe {
        libc::syscall(
            libc::SYS_arch_prctl,
            ARCH_REQ_XCOMP_PERM,
            XFEATURE_XTILEDATA,
        ) == 0
    }
}

/// Elsewhere nobody has asked how a program gets the permission.
#[cfg(not(target_os = "linux"))]
fn is_there() -> bool {
    false
}
