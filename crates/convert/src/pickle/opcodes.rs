//! A pickle's instructions, gone through before `burn-store` follows them: what they build is
//! bounded, for it copies whatever is noted or recalled, and walks what it built recursively.

use std::collections::HashMap;

/// Deepest nesting. Tensors of a model need about 10.
const MAX_DEPTH: usize = 100;
/// Bytes of everything that is ever built or copied. One tensor needs about 11 thousand, as a
/// parameter 19 thousand.
const MAX_BYTES: usize = 256 << 20;
/// Bytes of an object without its text.
const OBJECT_BYTES: usize = 128;
/// Most objects that one instruction gathers; Python writes 2000.
const MAX_GATHERED: usize = 4096;

/// What `burn-store` knows.
const KNOWN: &[u8] = b"(cNIJKMGUX]})tldQRbasueqrhj.\x80\x81\x85\x86\x87\x88\x89\x8a\x94";

const REDUCE: u8 = b'R';
const NEWOBJ: u8 = 0x81;
const EMPTY_TUPLE: u8 = b')';

/// What is known of a value.
#[derive(Clone, Copy)]
struct Value {
    /// 0 of what holds nothing.
    depth: usize,
    bytes: usize,
    /// Whether instructions gather objects down to this one.
    is_mark: bool,
}

/// What instructions have built so far.
#[derive(Default)]
struct Machine {
    stack: Vec<Value>,
    memo: HashMap<u32, Value>,
    /// Of all values that were ever pushed or noted.
    bytes: usize,
}

/// Refuses what would take too much memory or stack, and replaces every call of a function
/// (`REDUCE`) by that of a constructor (`NEWOBJ`).
///
/// `burn-store` answers the former with a tensor of its own; the latter it hands on with all
/// arguments. Calls without arguments make empty dictionaries and stay.
pub(super) fn check(pickle: &mut [u8]) -> Result<(), String> {
    let mut machine = Machine::default();
    let (mut at, mut previous) = (0, 0);
    while let Some(&opcode) = pickle.get(at) {
        let damaged = || format!("its pickle is damaged at byte {at}; download it again");
        if opcode == REDUCE && previous != EMPTY_TUPLE {
            pickle[at] = NEWOBJ;
        }
        if !KNOWN.contains(&opcode) {
            return Err(format!(
                "its pickle has the instruction {opcode:#04x} (byte {at}), which is not of protocol 2, \
                 the one of torch.save; save it with that, or as safetensors"
            ));
        }
        let rest = &pickle[at + 1..];
        let operand = operand_bytes(opcode, rest).and_then(|bytes| rest.get(..bytes));
        let operand = operand.ok_or_else(damaged)?;
        machine.follow(opcode, operand).ok_or_else(damaged)?;
        let top = machine.stack.last();
        if machine.bytes > MAX_BYTES || top.is_some_and(|top| top.depth > MAX_DEPTH) {
            return Err(format!(
                "its pickle builds more than a model needs (byte {at}); save the model as \
                 safetensors, if you trust it"
            ));
        }
        if opcode == b'.' {
            break;
        }
        at += 1 + operand.len();
        previous = opcode;
    }
    Ok(())
}

impl Value {
    /// The same with more in it.
    fn with(self, parts: &[Self]) -> Self {
        let mut whole = self;
        for part in parts {
            whole.depth = whole.depth.max(part.depth + 1);
            whole.bytes = whole.bytes.saturating_add(part.bytes);
        }
        whole
    }
}

impl Machine {
    /// What `burn-store` makes of an instruction, or something larger; `None` where it fails.
    fn follow(&mut self, opcode: u8, operand: &[u8]) -> Option<()> {
        match opcode {
            b'(' => self.push(&[], 0, true),
            b'c' => {
                // So does `burn-store` tell marks.
                let mut lines = operand.split(|&byte| byte == b'\n').take(2);
                let is_mark = lines.all(|line| line.strip_suffix(b"\r").unwrap_or(line) == b"mark");
                self.push(&[], operand.len(), is_mark);
            }
            b'N' | b'I' | b'J' | b'K' | b'M' | b'G' | b'U' | b'X' | b']' | b'}' | EMPTY_TUPLE
            | 0x88 | 0x89 | 0x8a => self.push(&[], operand.len(), false),
            b't' | b'l' | b'd' => {
                let parts = self.gather()?;
                self.push(&parts, 0, false);
            }
            0x85 | b'Q' | 0x86 | NEWOBJ | REDUCE | b'b' | 0x87 => {
                let count = match opcode {
                    0x85 | b'Q' => 1,
                    0x87 => 3,
                    _ => 2,
                };
                let parts = self.take(count)?;
                self.push(&parts, 0, false);
            }
            b'a' | b's' => {
                let parts = self.take(if opcode == b'a' { 1 } else { 2 })?;
                self.put_in(&parts)?;
            }
            b'u' | b'e' => {
                let parts = self.gather()?;
                self.put_in(&parts)?;
            }
            b'q' | b'r' | 0x94 => {
                let top = *self.stack.last()?;
                self.bytes = self.bytes.saturating_add(top.bytes);
                let key = match opcode {
                    0x94 => u32::try_from(self.memo.len()).ok()?,
                    _ => number(operand),
                };
                self.memo.insert(key, top);
            }
            b'h' | b'j' => {
                let noted = *self.memo.get(&number(operand))?;
                self.bytes = self.bytes.saturating_add(noted.bytes);
                self.stack.push(noted);
            }
            _ => {} // The end, or a version.
        }
        Some(())
    }

    /// A new value that holds others, and so many bytes of its own.
    fn push(&mut self, parts: &[Value], bytes: usize, is_mark: bool) {
        let bytes = OBJECT_BYTES + bytes;
        self.bytes = self.bytes.saturating_add(bytes);
        let empty = Value {
            depth: 0,
            bytes,
            is_mark,
        };
        self.stack.push(empty.with(parts));
    }

    /// Adds to the list or dictionary on top.
    fn put_in(&mut self, parts: &[Value]) -> Option<()> {
        let top = self.stack.last_mut()?;
        *top = top.with(parts);
        Some(())
    }

    fn take(&mut self, count: usize) -> Option<Vec<Value>> {
        let first = self.stack.len().checked_sub(count)?;
        Some(self.stack.split_off(first))
    }

    /// Takes what lies above the last mark, and that.
    fn gather(&mut self) -> Option<Vec<Value>> {
        let parts = self.stack.iter().rev().take(MAX_GATHERED + 1);
        let count = parts.take_while(|part| !part.is_mark).count();
        let mark = self.stack.len().checked_sub(count + 1)?;
        if count > MAX_GATHERED {
            return None;
        }
        let parts = self.take(count)?;
        self.stack.truncate(mark);
        Some(parts)
    }
}

/// The key of a note, in 1 or 4 bytes.
fn number(operand: &[u8]) -> u32 {
    operand
        .iter()
        .rev()
        .fold(0, |number, &byte| number << 8 | u32::from(byte))
}

/// Length of what follows an opcode that `burn-store` knows (Python's `pickletools`).
fn operand_bytes(opcode: u8, rest: &[u8]) -> Option<usize> {
    let line = |rest: &[u8]| Some(1 + rest.iter().position(|&byte| byte == b'\n')?);
    let short = || rest.first().map(|&length| 1 + usize::from(length));
    Some(match opcode {
        b'q' | b'h' | b'K' | 0x80 => 1,
        b'M' => 2,
        b'J' | b'r' | b'j' => 4,
        b'G' => 8,
        b'U' | 0x8a => short()?,
        b'X' => {
            let length = u32::from_le_bytes(*rest.first_chunk()?);
            usize::try_from(length).ok()?.checked_add(4)?
        }
        b'I' => line(rest)?,
        b'c' => {
            let module = line(rest)?;
            module + line(&rest[module..])?
        }
        _ => 0,
    })
}
