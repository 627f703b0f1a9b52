//! Content for the benches: what rows and indexes look like to a compressor.

/// Numbers that look random, from a seed.
#[derive(Clone, Debug)]
pub struct Rows(u64);

impl Rows {
    /// The sequence of a seed.
    pub fn new(seed: u64) -> Self {
        Rows(seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1)
    }

    fn number(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0.wrapping_mul(0x2545_F491_4F6C_DD1D)
    }

    /// Bytes like heap pages of orders: identifiers, times, text, JSON. zstd 1 makes about a third of them.
    pub fn heap(&mut self, len: usize) -> Vec<u8> {
        let mut out = Vec::with_capacity(len + 256);
        let mut id = 0u64;
        while out.len() < len {
            id += 1;
            let (a, b) = (self.number(), self.number());
            out.extend_from_slice(&id.to_le_bytes());
            out.extend_from_slice(&a.to_le_bytes());
            out.extend_from_slice(&b.to_le_bytes());
            out.extend_from_slice(format!("{:016x}{:08x}", a ^ b, b as u32).as_bytes());
            out.extend_from_slice(
                format!("{{\"sku\": {}, \"qty\": {}, \"tag\": \"open\"}}", a % 999, b % 7).as_bytes(),
            );
        }
        out.truncate(len);
        out
    }

    /// Text like a dump: COPY lines.
    pub fn dump(&mut self, len: usize) -> Vec<u8> {
        let mut out = Vec::with_capacity(len + 256);
        let mut id = 0u64;
        while out.len() < len {
            id += 1;
            let a = self.number();
            out.extend_from_slice(
                format!(
                    "{id}\t{}\t{:032x}\t2026-11-{:02} 10:00:00+00\t{}.{:02}\\n",
                    a % 5000,
                    a,
                    a % 28 + 1,
                    a % 900,
                    a % 100
                )
                .as_bytes(),
            );
        }
        out.truncate(len);
        out
    }
}
