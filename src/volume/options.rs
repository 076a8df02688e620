//! Options of `docker volume create -d nfsvol -o KEY=VALUE`.
//!
//! Invariants: every value was checked, an option equal to its default counts as not given (so
//! that `-o uid=0` and no `uid` are the same volume), and [`VolumeOptions::to_map`] parses back
//! to the same options. Known limit: options never change after creation; a Create with other
//! ones is refused with [`VolumeOptions::differences`].

use std::collections::BTreeMap;
use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use super::mount_options::{MountOptions, split};
use super::{VolumeName, local_form, mode};
use nfs::address::{Share, SharePath};

/// Every option, in the order of the documentation.
pub(crate) const OPTION_NAMES: [&str; 13] = [
    "share",
    "subdir",
    "options",
    "uid",
    "gid",
    "mode",
    "access",
    "data_path",
    "on_remove",
    "from",
    "type",
    "o",
    "device",
];
/// The directory of ours on a share; no volume may live in it.
pub(crate) const OWN_DIR: &str = ".nfsvol";
/// Whether a component of a path is [`OWN_DIR`] to some server: those that fold case, that leave
/// out what cannot be seen, or that cut off dots, spaces and the names of streams at the end.
#[must_use]
pub(crate) fn is_own_dir(component: &str) -> bool {
    let seen = |ch: &char| {
        !matches!(ch, '\u{ad}' | '\u{200b}'..='\u{200f}' | '\u{202a}'..='\u{202e}'
            | '\u{2060}'..='\u{206f}' | '\u{feff}')
    };
    let folded: String = component
        .chars()
        .filter(seen)
        .flat_map(char::to_uppercase)
        .flat_map(char::to_lowercase)
        .take_while(|ch| *ch != ':')
        .collect();
    folded.trim_end_matches(['.', ' ']) == OWN_DIR
}

/// What stands for the volume's name in `subdir`.
const NAME_TEMPLATE: &str = "{name}";
/// Permission bits of a data directory that the driver makes.
const DEFAULT_MODE: u32 = 0o755;
/// Options of at most this many bytes, so that a record stays small (see `Record`).
const MAX_VALUE: usize = 4096;

/// Why an option was refused; the text names the option and what would be right.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum OptionError {
    #[error("unknown option {key:?}{}; the options are {}", did_you_mean(*.nearest), there_now().join(", "))]
    Unknown {
        key: String,
        nearest: Option<&'static str>,
    },
    #[error("option {key}={value:?}: {reason}")]
    Value {
        key: &'static str,
        value: String,
        reason: String,
    },
    #[error("option {key} is not available yet: {reason}")]
    NotYet {
        key: &'static str,
        reason: &'static str,
    },
    #[error("options {0} and {1} exclude each other: {2}")]
    Conflict(&'static str, &'static str, &'static str),
    #[error("option {0} is missing: {1}")]
    Missing(&'static str, &'static str),
}

/// The names of the options that have an effect in this release.
fn there_now() -> Vec<&'static str> {
    let mut names = OPTION_NAMES.to_vec();
    names.retain(|name| *name != "from");
    names
}

fn did_you_mean(word: Option<&'static str>) -> String {
    word.map_or_else(String::new, |w| format!(" (did you mean {w:?}?)"))
}

/// The word of `known` nearest to `word`, when one is near enough to be a slip.
pub(crate) fn nearest_of(word: &str, known: &[&'static str]) -> Option<&'static str> {
    let score = |k: &&'static str| strsim::jaro_winkler(&word.to_lowercase(), k);
    known
        .iter()
        .copied()
        .filter(|k| score(k) > 0.75)
        .max_by(|a, b| score(a).total_cmp(&score(b)))
}

/// An option that is one of a few words.
macro_rules! word_option {
    ($(#[$doc:meta])* $vis:vis $name:ident($key:literal) { $($(#[$vdoc:meta])* $variant:ident = $word:literal),+ $(,)? }) => {
        $(#[$doc])*
        #[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
        #[serde(rename_all = "lowercase")]
        $vis enum $name { $($(#[$vdoc])* $variant),+ }

        impl $name {
            const WORDS: &'static [&'static str] = &[$($word),+];

            #[must_use]
            $vis fn as_str(self) -> &'static str {
                match self { $(Self::$variant => $word),+ }
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(self.as_str())
            }
        }

        impl FromStr for $name {
            type Err = OptionError;

            fn from_str(text: &str) -> Result<Self, Self::Err> {
                match text {
                    $($word => Ok(Self::$variant),)+
                    _ => {
                        let hint = did_you_mean(nearest_of(text, Self::WORDS));
                        Err(bad($key, text, format!("expected one of {}{hint}", Self::WORDS.join(", "))))
                    }
                }
            }
        }
    };
}

word_option! {
    /// Who may use the volume at once.
    pub Access("access") {
        /// Any number of hosts, reading and writing.
        #[default]
        Shared = "shared",
        /// One host at a time.
        Exclusive = "exclusive",
        /// Any number of hosts, reading only.
        Readonly = "readonly",
    }
}

word_option! {
    /// How bytes travel.
    pub DataPath("data_path") {
        /// The kernel's client where the kernel has NFS, FUSE otherwise.
        #[default]
        Auto = "auto",
        /// The kernel's NFS client.
        Kernel = "kernel",
        /// NFSv3 in user space.
        Fuse = "fuse",
    }
}

word_option! {
    /// What `docker volume rm` does with a data directory that the driver made.
    pub OnRemove("on_remove") {
        /// Keep it for a while, restorable.
        #[default]
        Trash = "trash",
        /// Leave the directory where it is.
        Retain = "retain",
        /// Delete it.
        Delete = "delete",
    }
}

word_option! {
    /// What a Create does that follows a Remove of the same name with other options: Docker's Compose
    /// changes a volume's options so, in two calls. A setting of the daemon.
    pub(crate) Recreate("recreate") {
        /// It brings the data back, with the new options.
        #[default]
        Keep = "keep",
        /// It makes an empty volume.
        Empty = "empty",
        /// It fails.
        Refuse = "refuse",
    }
}

pub(super) fn bad(key: &'static str, value: &str, reason: impl Into<String>) -> OptionError {
    OptionError::Value {
        key,
        value: value.to_owned(),
        reason: reason.into(),
    }
}

/// Owner and mode of a data directory that the driver makes; never applied to one that it finds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Owner {
    pub uid: u32,
    pub gid: u32,
    /// Permission bits, 0 to 07777.
    pub mode: u32,
}

impl Default for Owner {
    fn default() -> Self {
        Self {
            uid: 0,
            gid: 0,
            mode: DEFAULT_MODE,
        }
    }
}

/// The checked options of one volume.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct VolumeOptions {
    /// `None`: the home share.
    pub share: Option<Share>,
    /// As given; `None`: `{name}`.
    pub subdir: Option<String>,
    /// `None`: what the daemon is set to.
    pub mount: Option<MountOptions>,
    pub owner: Owner,
    pub access: Access,
    pub data_path: DataPath,
    /// `None`: what the daemon that creates the volume is set to.
    pub on_remove: Option<OnRemove>,
    /// The version of NFS was not named, but is that of `type=nfs`.
    pub(super) version_by_type: HowGiven,
}

/// How options were written, which makes no difference between two volumes.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct HowGiven(bool);

impl From<bool> for HowGiven {
    fn from(given: bool) -> Self {
        Self(given)
    }
}

impl PartialEq for HowGiven {
    fn eq(&self, _: &Self) -> bool {
        true
    }
}

impl Eq for HowGiven {}

impl VolumeOptions {
    /// Checks the options of a Create call.
    ///
    /// # Errors
    /// [`OptionError`], naming the first option that is unknown, malformed or in conflict.
    pub fn parse(given: &BTreeMap<String, String>) -> Result<Self, OptionError> {
        for (key, value) in given {
            let Some(key) = OPTION_NAMES.iter().find(|k| *k == key) else {
                let nearest = nearest_of(key, &there_now());
                return Err(OptionError::Unknown {
                    key: key.clone(),
                    nearest,
                });
            };
            if value.len() > MAX_VALUE {
                return Err(bad(key, &value[..0], "longer than 4,096 bytes"));
            }
            if value.chars().any(char::is_control) {
                return Err(bad(key, value, "holds a control character"));
            }
        }
        let get = |key: &str| given.get(key).map(String::as_str);
        if get("from").is_some() {
            let reason = "copies of volumes and snapshots come with a later release";
            return Err(OptionError::NotYet {
                key: "from",
                reason,
            });
        }
        let mut options = Self {
            owner: Owner {
                uid: number("uid", get("uid"))?,
                gid: number("gid", get("gid"))?,
                mode: get("mode")
                    .map(mode::parse)
                    .transpose()?
                    .unwrap_or(DEFAULT_MODE),
            },
            access: get("access")
                .map(str::parse)
                .transpose()?
                .unwrap_or_default(),
            data_path: get("data_path")
                .map(str::parse)
                .transpose()?
                .unwrap_or_default(),
            on_remove: get("on_remove").map(str::parse).transpose()?,
            ..Self::default()
        };
        if local_form::is_used(given) {
            local_form::apply(given, &mut options)?;
            return Ok(options);
        }
        options.share = get("share")
            .map(|s| s.parse().map_err(|e| bad("share", s, format!("{e}"))))
            .transpose()?;
        options.subdir = get("subdir")
            .map(subdir)
            .transpose()?
            .filter(|s| s != NAME_TEMPLATE);
        let again = |word: &&str| match &options.share {
            Some(share) => local_form::names_again(word, share),
            None => false,
        };
        let words = get("options").map(|o| split(o).filter(|word| !again(word)));
        let text = words.map(|words| words.collect::<Vec<_>>().join(","));
        options.mount = text
            .map(|o| o.parse().map_err(|e| bad("options", &o, format!("{e}"))))
            .transpose()?;
        Ok(options)
    }

    /// The data directory of a volume called `name`, below its share.
    ///
    /// # Errors
    /// [`OptionError::Value`] when the name makes the path too long, or when the directory would
    /// be the home share's export itself or lie in the driver's own directory.
    pub fn data_dir(&self, name: &VolumeName) -> Result<SharePath, OptionError> {
        let template = self.subdir.as_deref().unwrap_or(NAME_TEMPLATE);
        let path = SharePath::parse(&template.replace(NAME_TEMPLATE, name.as_str()))
            .map_err(|e| bad("subdir", template, e.to_string()))?;
        if path.components().any(is_own_dir) {
            return Err(bad(
                "subdir",
                template,
                "the directory .nfsvol belongs to the driver",
            ));
        }
        if path.is_root() && self.share.is_none() {
            let reason = "the home share's export itself holds the catalog; name a directory";
            return Err(bad("subdir", template, reason));
        }
        Ok(path)
    }

    /// The options that differ from their defaults, in the form in which they are given.
    #[must_use]
    pub fn to_map(&self) -> BTreeMap<String, String> {
        let mut map = BTreeMap::new();
        let mut put = |key: &str, value: Option<String>| {
            if let Some(value) = value {
                map.insert(key.to_owned(), value);
            }
        };
        put("share", self.share.as_ref().map(Share::to_string));
        put("subdir", self.subdir.clone());
        put("options", self.mount.as_ref().map(MountOptions::to_string));
        let default = Owner::default();
        put(
            "uid",
            (self.owner.uid != default.uid).then(|| self.owner.uid.to_string()),
        );
        put(
            "gid",
            (self.owner.gid != default.gid).then(|| self.owner.gid.to_string()),
        );
        put(
            "mode",
            (self.owner.mode != default.mode).then(|| mode::show(self.owner.mode)),
        );
        put(
            "access",
            (self.access != Access::default()).then(|| self.access.to_string()),
        );
        let data_path = self.data_path;
        put(
            "data_path",
            (data_path != DataPath::default()).then(|| data_path.to_string()),
        );
        put("on_remove", self.on_remove.map(|o| o.to_string()));
        map
    }

    /// Whether these are the options that [`Self::parse`] once made of what it makes `asked` of now: with
    /// `type=nfs` and without a version.
    fn versions_are_free(&self, asked: &Self) -> bool {
        let have = self.mount.clone().unwrap_or_default();
        let want = asked.mount.clone().unwrap_or_default();
        have.nfsvers().is_none() && have == want.of_any_version()
    }

    /// What a Create with `asked` would change: one line for each option that is not equal.
    #[must_use]
    pub fn differences(&self, asked: &Self) -> Vec<String> {
        let mut asked = asked.clone();
        if asked.version_by_type.0 && self.versions_are_free(&asked) {
            asked.mount.clone_from(&self.mount);
        }
        let (have, want) = (self.to_map(), asked.to_map());
        let show = |map: &BTreeMap<String, String>, key| {
            map.get(key)
                .map_or_else(|| "not set".to_owned(), |v| format!("{v:?}"))
        };
        OPTION_NAMES
            .iter()
            .filter(|key| have.get(**key) != want.get(**key))
            .map(|key| {
                format!(
                    "{key} is {}, asked for {}",
                    show(&have, *key),
                    show(&want, *key)
                )
            })
            .collect()
    }
}

impl Serialize for VolumeOptions {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        self.to_map().serialize(serializer)
    }
}

impl<'de> Deserialize<'de> for VolumeOptions {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let mut map = BTreeMap::<String, String>::deserialize(deserializer)?;
        if let Some(mode) = map.get_mut("mode") {
            mode::of_record(mode);
        }
        Self::parse(&map).map_err(serde::de::Error::custom)
    }
}

fn number(key: &'static str, text: Option<&str>) -> Result<u32, OptionError> {
    let Some(text) = text else { return Ok(0) };
    match text.parse() {
        // 2^32-1 means "leave as it is" to chown(2).
        Ok(u32::MAX) | Err(_) => Err(bad(
            key,
            text,
            "expected a number from 0 to 4294967294 (names differ between hosts)",
        )),
        Ok(number) => Ok(number),
    }
}

fn subdir(text: &str) -> Result<String, OptionError> {
    let rest = text.replace(NAME_TEMPLATE, "");
    if rest.contains(['{', '}']) {
        return Err(bad("subdir", text, "only {name} can stand in braces"));
    }
    SharePath::parse(text)
        .map(|path| path.as_str().to_owned())
        .map_err(|e| bad("subdir", text, e.to_string()))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn parse(pairs: &[(&str, &str)]) -> Result<VolumeOptions, OptionError> {
        let map = pairs
            .iter()
            .map(|(k, v)| ((*k).to_owned(), (*v).to_owned()))
            .collect();
        VolumeOptions::parse(&map)
    }

    fn refusal(key: &str, value: &str) -> String {
        parse(&[(key, value)]).unwrap_err().to_string()
    }

    #[test]
    fn an_option_that_equals_its_default_is_not_a_difference() {
        let explicit = parse(&[("uid", "0"), ("mode", "755"), ("subdir", "{name}")]).unwrap();
        assert_eq!(explicit, parse(&[]).unwrap());
    }

    #[test]
    fn refusals_name_the_option_and_the_nearest_spelling() {
        assert!(refusal("sahre", "x").contains("did you mean \"share\"?"));
        assert!(refusal("acess", "x").contains("did you mean \"access\"?"));
        assert!(refusal("zzz", "x").starts_with("unknown option \"zzz\"; the options are share"));
        assert!(!refusal("zzz", "x").contains("from"), "not there yet");
        assert!(!refusal("ro", "x").contains("from"), "not there yet");
        assert!(refusal("access", "exlusive").contains("did you mean \"exclusive\"?"));
        for (key, value) in [
            ("uid", "root"),
            ("uid", "4294967295"),
            ("gid", "-1"),
            ("mode", "0999"),
            ("mode", "u+x"),
            ("mode", "10755"),
            ("subdir", "a/../b"),
            ("subdir", "{uid}/x"),
            ("subdir", "a\nb"),
            ("share", "nas"),
            ("options", "vers=3,addr=6.6.6.6"),
            ("on_remove", "keep"),
            ("data_path", "smb"),
        ] {
            let text = refusal(key, value);
            assert!(text.contains(&format!("option {key}=")), "{text}");
        }
    }

    #[test]
    fn what_comes_later_says_so() {
        assert!(refusal("from", "other").contains("not available yet"));
    }

    #[test]
    fn the_data_directory_follows_the_template_and_stays_out_of_ours() {
        let name: VolumeName = "db".parse().unwrap();
        let dir = |s| parse(&[("subdir", s)]).unwrap().data_dir(&name);
        assert_eq!(parse(&[]).unwrap().data_dir(&name).unwrap().as_str(), "db");
        assert_eq!(dir("apps/{name}/v1").unwrap().as_str(), "apps/db/v1");
        assert!(dir(".nfsvol/volumes").is_err());
        assert!(dir(".").is_err());
        let whole = parse(&[("share", "nas:/x"), ("subdir", ".")]).unwrap();
        assert!(whole.data_dir(&name).unwrap().is_root());
    }

    #[test]
    fn differences_name_each_option_with_both_values() {
        let have = parse(&[("uid", "999"), ("on_remove", "retain")]).unwrap();
        let want = parse(&[("uid", "1000"), ("on_remove", "retain")]).unwrap();
        assert_eq!(
            have.differences(&want),
            ["uid is \"999\", asked for \"1000\""]
        );
        assert_eq!(have.differences(&have), [""; 0]);
    }

    proptest! {
        #[test]
        fn options_survive_being_written_and_read(
            uid in 0..u32::MAX, mode in 0..=0o7777_u32, subdir in "[a-z]{1,9}(/\\{name\\})?",
            readonly in any::<bool>(),
        ) {
            let access = if readonly { "readonly" } else { "shared" };
            let options = parse(&[
                ("uid", &uid.to_string()), ("mode", &format!("0{mode:o}")),
                ("subdir", &subdir), ("access", access), ("share", "nas:/export"),
            ]).unwrap();
            prop_assert_eq!(VolumeOptions::parse(&options.to_map()).unwrap(), options);
        }

        #[test]
        fn no_input_makes_a_path_outside_the_share(key in "subdir|share", value in "[./a{}name~\\\\ ]{0,30}") {
            let name: VolumeName = "db".parse().unwrap();
            if let Ok(options) = parse(&[(&key, &value)])
                && let Ok(dir) = options.data_dir(&name)
            {
                prop_assert!(dir.components().all(|c| c != ".."));
            }
        }
    }
}
