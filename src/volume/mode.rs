//! Permission bits as a user writes them: `0750`, `755`, `1777`.
//!
//! YAML reads an unquoted `0770` as an octal number, and Compose hands its decimal digits over: `504`.
//! Invariant: no such number is taken for permission bits. Digits that do not begin with a 0 count only
//! where they let the owner do everything (7 in the third place from the right), which the decimal digits
//! of no mode with such an owner do.

use super::options::{OptionError, bad};

/// The highest of all permission bits.
const MOST: u32 = 0o7777;
/// What the owner may do.
const OWNER: u32 = 0o700;

/// Reads a mode.
pub(super) fn parse(text: &str) -> Result<u32, OptionError> {
    let octal = (1..=5).contains(&text.len()) && text.bytes().all(|b| (b'0'..=b'7').contains(&b));
    let mode = u32::from_str_radix(text, 8).ok();
    let Some(mode) = mode.filter(|mode| octal && *mode <= MOST) else {
        return Err(refused(text, None));
    };
    match text.starts_with('0') || mode & OWNER == OWNER {
        true => Ok(mode),
        false => Err(refused(text, Some(mode))),
    }
}

/// The mode as it is read again.
pub(super) fn show(mode: u32) -> String {
    match mode > 0o777 && mode & OWNER != OWNER {
        true => format!("0{mode:o}"),
        false => format!("{mode:04o}"),
    }
}

/// A mode in a record, which may have been written before [`show`] put a 0 before all that needs one.
pub(super) fn of_record(text: &mut String) {
    if text.len() == 4 && !text.starts_with('0') {
        text.insert(0, '0');
    }
}

/// Names what was meant, as far as that can be guessed.
fn refused(text: &str, octal: Option<u32>) -> OptionError {
    let usable = |mode: &u32| *mode <= MOST && mode & OWNER == OWNER;
    let of_yaml = text.parse::<u32>().ok().filter(usable);
    let reason = match (of_yaml, octal) {
        (Some(mode), _) => format!(
            "YAML makes {text} of 0{mode:03o} without quotes; write it in quotes, mode: \"0{mode:03o}\""
        ),
        (None, Some(mode)) => format!(
            "it does not begin with a 0, so it may be what YAML made of an octal number without quotes; \
             if it is meant, write mode: \"0{mode:03o}\""
        ),
        (None, None) => {
            "expected octal permission bits, for example 0755 or 01777; in YAML in quotes, \
             mode: \"0755\""
                .to_owned()
        }
    };
    bad("mode", text, reason)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_yaml_makes_of_an_octal_number_is_never_a_mode() {
        let usable = (0..=MOST).filter(|mode| mode & OWNER == OWNER);
        let mut yaml = usable.map(|mode| mode.to_string());
        assert_eq!(yaml.find(|yaml| parse(yaml).is_ok()), None);
        for (yaml, meant) in [
            ("448", "0700"),
            ("493", "0755"),
            ("488", "0750"),
            ("504", "0770"),
            ("511", "0777"),
            ("457", "0711"),
            ("475", "0733"),
            ("472", "0730"),
            ("509", "0775"),
            ("1023", "01777"),
            ("1533", "02775"),
        ] {
            let said = parse(yaml).unwrap_err().to_string();
            assert!(
                said.contains(&format!("in quotes, mode: \"{meant}\"")),
                "{said}"
            );
        }
        // Read-only directories, and those of a group alone.
        for (yaml, meant) in [("365", "0365"), ("320", "0320"), ("56", "056")] {
            let said = parse(yaml).unwrap_err().to_string();
            assert!(said.contains(meant), "{said}");
        }
    }

    #[test]
    fn what_is_written_in_quotes_or_for_a_shell_is_taken() {
        for (text, mode) in [
            ("0770", 0o770),
            ("770", 0o770),
            ("755", 0o755),
            ("2750", 0o2750),
            ("01777", 0o1777),
            ("0504", 0o504),
            ("0", 0),
        ] {
            assert_eq!(parse(text).unwrap(), mode, "{text}");
        }
    }

    #[test]
    fn every_mode_is_read_as_it_is_shown() {
        for mode in 0..=MOST {
            assert_eq!(parse(&show(mode)), Ok(mode));
            let mut earlier = format!("{mode:04o}");
            of_record(&mut earlier);
            assert_eq!(parse(&earlier), Ok(mode));
        }
    }
}
