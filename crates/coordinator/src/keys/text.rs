//! The text of a key, which is a secret, and its hash, which is none.

use ring::digest::{SHA256, digest};
use serde::{Deserialize, Deserializer, Serialize, Serializer, de};
use std::fmt;
use subtle::ConstantTimeEq as _;
use zeroize::Zeroizing;

/// Tells people and secret scanners what it is.
const PREFIX: &str = "mlx-";
const ALPHABET: &[u8; 62] = b"0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz";
/// 62^43 is just above 2^256.
const LETTERS: usize = 43;

/// A key as its owner has it: `mlx-` and 256 random bits in base62. It prints with [`KeyText::reveal`] only.
#[derive(Clone, PartialEq, Eq)]
pub struct KeyText(Zeroizing<String>);

impl KeyText {
    /// From 32 random bytes.
    pub fn new(random: &[u8; 32]) -> Self {
        let mut number = Zeroizing::new(*random);
        let mut letters = Zeroizing::new([0_u8; LETTERS]);
        for letter in letters.iter_mut().rev() {
            // Long division of a 256-bit number, most significant byte first.
            let mut rest = 0_u32;
            for byte in number.iter_mut() {
                let value = (rest << 8) | u32::from(*byte);
                *byte = (value / 62) as u8;
                rest = value % 62;
            }
            *letter = ALPHABET[rest as usize];
        }
        let mut text = Zeroizing::new(String::with_capacity(PREFIX.len() + LETTERS));
        text.push_str(PREFIX);
        text.extend(letters.iter().copied().map(char::from));
        Self(text)
    }

    /// The text, for the one who made the key.
    pub fn reveal(&self) -> &str {
        &self.0
    }

    /// What is kept of it.
    pub fn hash(&self) -> KeyHash {
        KeyHash::of(&self.0)
    }
}

impl fmt::Debug for KeyText {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        out.write_str("KeyText(secret)")
    }
}

/// SHA-256 of a key's text.
#[derive(Clone, Copy)]
pub struct KeyHash([u8; 32]);

impl KeyHash {
    /// From its bytes.
    pub fn from_bytes(bytes: [u8; 32]) -> Self {
        Self(bytes)
    }

    /// Its bytes.
    pub fn as_bytes(&self) -> &[u8; 32] {
        &self.0
    }

    /// Of a text that has the form of a key; others are not worth the work, and the form is no secret.
    pub fn of_text(presented: &str) -> Option<Self> {
        let letters = presented.strip_prefix(PREFIX)?;
        let is_key = letters.len() == LETTERS && letters.bytes().all(|letter| letter.is_ascii_alphanumeric());
        is_key.then(|| Self::of(presented))
    }

    fn of(text: &str) -> Self {
        let mut hash = [0; 32];
        hash.copy_from_slice(digest(&SHA256, text.as_bytes()).as_ref());
        Self(hash)
    }

    /// Names the key in logs: eight bytes of the hash, in hex.
    pub fn id(&self) -> String {
        self.0[..8].iter().map(|byte| format!("{byte:02x}")).collect()
    }

    /// Whether two are the same, in the same time whatever they are.
    pub fn is(&self, other: &Self) -> bool {
        self.0.ct_eq(&other.0).into()
    }
}

impl PartialEq for KeyHash {
    fn eq(&self, other: &Self) -> bool {
        self.is(other)
    }
}

impl Eq for KeyHash {}

impl fmt::Debug for KeyHash {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(out, "KeyHash({})", self.id())
    }
}

impl Serialize for KeyHash {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let hex: String = self.0.iter().map(|byte| format!("{byte:02x}")).collect();
        serializer.serialize_str(&hex)
    }
}

impl<'de> Deserialize<'de> for KeyHash {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let hex = String::deserialize(deserializer)?;
        let mut hash = [0; 32];
        if hex.len() != 64 || !hex.bytes().all(|digit| digit.is_ascii_hexdigit()) {
            return Err(de::Error::custom("the hash of a key has 64 hex digits"));
        }
        for (byte, digits) in hash.iter_mut().zip(hex.as_bytes().chunks_exact(2)) {
            let value = |digit: u8| (digit as char).to_digit(16).unwrap_or_default() as u8;
            *byte = value(digits[0]) << 4 | value(digits[1]);
        }
        Ok(Self(hash))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_text_is_the_number_in_base62() {
        let zeros = format!("mlx-{}", "0".repeat(43));
        assert_eq!(KeyText::new(&[0; 32]).reveal(), zeros);
        let mut small = [0; 32];
        small[30..].copy_from_slice(&(62 * 61 + 10_u16).to_be_bytes());
        assert_eq!(KeyText::new(&small).reveal(), format!("mlx-{}zA", "0".repeat(41)));
        // 2^256 - 1 in base62, computed elsewhere.
        assert_eq!(KeyText::new(&[255; 32]).reveal(), "mlx-yhjskwdA6OZ1AL1YmHWZWm8LLG7HjnuCA2j5rOw8Xp1");
    }

    #[test]
    fn neither_prints_what_must_stay_secret() {
        let text = KeyText::new(&[7; 32]);
        let printed = format!("{text:?} {:?}", text.hash());
        assert!(!printed.contains(&text.reveal()[4..12]), "{printed}");
    }

    #[test]
    fn hashes_are_those_of_the_standard() {
        // sha256sum of the text.
        let hash = KeyHash::of_text(KeyText::new(&[0; 32]).reveal()).unwrap();
        let json = serde_json::to_string(&hash).unwrap();
        assert_eq!(json, "\"39dd79a3f97e4c6370739917862c5c734ef42c60bcf2a836800cc8b3425b6b5e\"");
        assert_eq!(serde_json::from_str::<KeyHash>(&json).unwrap(), hash);
        for wrong in ["\"\"", "\"zz\"", "7", &format!("\"{}\"", "g".repeat(64))] {
            assert!(serde_json::from_str::<KeyHash>(wrong).is_err(), "{wrong}");
        }
    }
}
