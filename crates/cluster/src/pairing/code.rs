//! The short code: 8 characters of Crockford's base32, 40 bits, shown as `7H2K-93QF`.
//!
//! Read aloud and typed by people: case, dashes and spaces do not count, I and L read as 1, O as 0, and U as V.
//! 40 bits suffice because SPAKE2 allows one guess per try and an invite allows five tries.

use super::InviteError;
use std::fmt;
use std::str::FromStr;
use zeroize::Zeroizing;

const ALPHABET: &[u8; 32] = b"0123456789ABCDEFGHJKMNPQRSTVWXYZ";
const LENGTH: usize = 8;

/// A short invite code. Its text is a secret: it prints with [`InviteCode::reveal`] only.
#[derive(Clone, PartialEq, Eq)]
pub struct InviteCode(Zeroizing<String>);

impl InviteCode {
    /// A new random code.
    pub fn generate() -> Self {
        let letters = rand::random::<[u8; LENGTH]>().map(|byte| ALPHABET[usize::from(byte % 32)]);
        Self(Zeroizing::new(letters.iter().copied().map(char::from).collect()))
    }

    /// As people read it: `XXXX-XXXX`.
    pub fn reveal(&self) -> String {
        format!("{}-{}", &self.0[..LENGTH / 2], &self.0[LENGTH / 2..])
    }

    /// The password for the exchange.
    pub(super) fn password(&self) -> &[u8] {
        self.0.as_bytes()
    }
}

impl FromStr for InviteCode {
    type Err = InviteError;
    fn from_str(text: &str) -> Result<Self, InviteError> {
        let mut letters = Zeroizing::new(String::with_capacity(LENGTH));
        for typed in text.chars().filter(|c| !c.is_whitespace() && !matches!(c, '-' | '_' | '–' | '—' | '.'))
        {
            let letter = match typed.to_ascii_uppercase() {
                'I' | 'L' => '1',
                'O' => '0',
                'U' => 'V',
                other => other,
            };
            if !letter.is_ascii() || !ALPHABET.contains(&(letter as u8)) {
                return Err(InviteError::CodeCharacter(typed));
            }
            if letters.len() < LENGTH {
                letters.push(letter);
            } else {
                return Err(InviteError::CodeLength { found: LENGTH + 1 });
            }
        }
        if letters.len() != LENGTH {
            return Err(InviteError::CodeLength { found: letters.len() });
        }
        Ok(Self(letters))
    }
}

impl fmt::Debug for InviteCode {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        out.write_str("InviteCode(…)")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_code_is_read_as_people_write_it() {
        let code: InviteCode = "7H2K-01VF".parse().unwrap();
        for typed in ["7h2k-01vf", " 7H2K 01VF ", "7h2koluf", "7H-2K-Oi-UF", "7h2k–01vf"] {
            assert_eq!(typed.parse::<InviteCode>().unwrap(), code, "{typed}");
        }
        assert_eq!(code.reveal(), "7H2K-01VF");
        assert_eq!(format!("{code:?}"), "InviteCode(…)");
    }

    #[test]
    fn what_is_no_code_is_refused() {
        assert_eq!("7H2K-01V".parse::<InviteCode>(), Err(InviteError::CodeLength { found: 7 }));
        assert_eq!("".parse::<InviteCode>(), Err(InviteError::CodeLength { found: 0 }));
        assert_eq!("7H2K-01VFX".parse::<InviteCode>(), Err(InviteError::CodeLength { found: 9 }));
        assert_eq!("7H2K-01V!".parse::<InviteCode>(), Err(InviteError::CodeCharacter('!')));
        assert_eq!("7H2K-01Vé".parse::<InviteCode>(), Err(InviteError::CodeCharacter('é')));
    }

    #[test]
    fn random_codes_parse_and_differ() {
        let codes: std::collections::HashSet<_> = (0..200).map(|_| InviteCode::generate().reveal()).collect();
        assert_eq!(codes.len(), 200);
        assert!(codes.iter().all(|code| code.parse::<InviteCode>().unwrap().reveal() == *code));
    }
}
