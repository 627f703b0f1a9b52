//! Changes to bytes, without knowing what they mean.

/// Numbers that look random and are a function of the seed (SplitMix64).
#[derive(Clone, Debug)]
pub struct Chance(u64);

impl Chance {
    /// A course of its own for each seed.
    pub fn new(seed: u64) -> Self {
        Chance(seed)
    }

    /// The next number.
    pub fn number(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    /// A number below `end`, which is not zero.
    pub fn below(&mut self, end: usize) -> usize {
        (self.number() % end.max(1) as u64) as usize
    }
}

/// No input grows beyond this.
pub const MAX_LEN: usize = 1 << 20;

/// Numbers at which readers tend to stumble.
const EDGES: [u64; 14] = [
    0,
    1,
    2,
    0x7f,
    0x80,
    0xff,
    0x100,
    0x7fff,
    0xffff,
    0x7fff_ffff,
    0xffff_ffff,
    0x1_0000_0000,
    0x7fff_ffff_ffff_ffff,
    u64::MAX,
];

/// Words of the text formats, beside what the seeds have.
const WORDS: [&[u8]; 12] = [
    b"0",
    b"-1",
    b"null",
    b"{",
    b"[",
    b"\"",
    b"/",
    b"%",
    b"\n",
    b"\t",
    b"9999999999999999999999",
    b"\xff\xfe",
];

/// Changes `input`, taking parts of `other` now and then.
pub fn mutate(input: &[u8], other: &[u8], chance: &mut Chance) -> Vec<u8> {
    let mut out = input.to_vec();
    // Mostly few changes: what is changed everywhere is refused at the first byte.
    for _ in 0..1 + chance.below(4) * chance.below(3) {
        change(&mut out, other, chance);
        out.truncate(MAX_LEN);
    }
    out
}

fn change(out: &mut Vec<u8>, other: &[u8], chance: &mut Chance) {
    let at = chance.below(out.len().max(1));
    match chance.below(12) {
        0..=2 => flip(out, at, chance),
        3 => set(out, at, &[chance.number() as u8]),
        4 | 5 => {
            let width = 1 << chance.below(4);
            let edge = EDGES[chance.below(EDGES.len())].wrapping_sub(chance.below(2) as u64);
            let bytes = if chance.below(4) == 0 { edge.to_be_bytes() } else { edge.to_le_bytes() };
            set(out, at, &bytes[..width]);
        }
        6 => insert(out, at, WORDS[chance.below(WORDS.len())]),
        7 => {
            let from = chance.below(other.len().max(1));
            let len = 1 + chance.below(64);
            let part = &other[from.min(other.len())..(from + len).min(other.len())];
            if chance.below(2) == 0 { insert(out, at, part) } else { set(out, at, part) }
        }
        8 => {
            let part = out[at.min(out.len())..(at + 1 + chance.below(32)).min(out.len())].to_vec();
            insert(out, at, &part);
        }
        9 => {
            let end = (at + 1 + chance.below(16)).min(out.len());
            out.drain(at.min(end)..end);
        }
        10 => out.truncate(at),
        // A digit to another one: text stays text.
        _ => match out.iter().skip(at).position(u8::is_ascii_digit) {
            Some(found) => out[at + found] = b'0' + chance.below(10) as u8,
            None => flip(out, at, chance),
        },
    }
}

fn flip(out: &mut [u8], at: usize, chance: &mut Chance) {
    if let Some(byte) = out.get_mut(at) {
        *byte ^= 1 << chance.below(8);
    }
}

fn set(out: &mut [u8], at: usize, bytes: &[u8]) {
    out.iter_mut().skip(at).zip(bytes).for_each(|(to, from)| *to = *from);
}

fn insert(out: &mut Vec<u8>, at: usize, bytes: &[u8]) {
    let at = at.min(out.len());
    out.splice(at..at, bytes.iter().copied());
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_seed_is_one_course_and_most_changes_change_something() {
        let input: Vec<u8> = (0..200).collect();
        let course = |seed| {
            let mut chance = Chance::new(seed);
            (0..500).map(|_| mutate(&input, b"other", &mut chance)).collect::<Vec<_>>()
        };
        assert_eq!(course(7), course(7));
        assert_ne!(course(7), course(8));
        assert!(course(7).iter().filter(|out| **out != input).count() > 400);
    }

    #[test]
    fn nothing_is_too_short_to_be_changed() {
        let mut chance = Chance::new(1);
        let mut longest = 0;
        for _ in 0..2000 {
            longest = longest.max(mutate(&[], &[], &mut chance).len());
        }
        assert!(longest > 0);
    }
}
