use proptest::prelude::*;

use super::words::WORDS;
use super::*;

fn parse(text: &str) -> MountOptions {
    text.parse().unwrap()
}

fn error(text: &str) -> String {
    text.parse::<MountOptions>().unwrap_err().to_string()
}

#[test]
fn the_safe_defaults_hold_until_written_otherwise() {
    assert_eq!(parse("").to_string(), "hard,nodev,nosuid");
    assert_eq!(parse("suid,dev,soft").to_string(), "dev,soft,suid");
    assert!(parse("softerr").is_soft() && !parse("").is_soft());
}

#[test]
fn the_last_word_about_one_thing_wins() {
    assert_eq!(
        parse("vers=3,rw,v4.1,ro,tcp,proto=rdma6").to_string(),
        "hard,nfsvers=4.1,nodev,nosuid,proto=rdma,ro"
    );
}

#[test]
fn words_of_fstab_have_no_effect() {
    assert_eq!(
        parse("_netdev,nofail,x-systemd.automount,retry=2,bg,defaults,intr"),
        MountOptions::default()
    );
}

#[test]
fn a_misspelt_word_is_refused_with_the_nearest_one() {
    assert_eq!(
        error("nconect=4"),
        "mount option \"nconect\" is not known to nfs(5); did you mean \"nconnect\"?"
    );
    assert_eq!(error("zzz"), "mount option \"zzz\" is not known to nfs(5)");
    assert!(error("adr=1.2.3.4").contains("not known"));
}

#[test]
fn values_out_of_range_are_refused_with_the_range() {
    assert_eq!(
        error("nconnect=17"),
        "mount option nconnect=17: expected a whole number from 1 to 16"
    );
    assert_eq!(
        error("nfsvers=2"),
        "mount option nfsvers=2: expected one of 3, 4, 4.0, 4.1, 4.2"
    );
    for bad in [
        "timeo=",
        "timeo",
        "ro=1",
        "sec=krb5:none2",
        "port=70000",
        "rsize=-1",
        "hard=1",
    ] {
        assert!(bad.parse::<MountOptions>().is_err(), "{bad}");
    }
}

#[test]
fn what_the_driver_decides_cannot_be_smuggled_in() {
    for bad in [
        "addr=10.0.0.9",
        "ro,clientaddr=1.2.3.4",
        "mountaddr=1.2.3.4",
        "mounthost=evil",
        "source=evil:/",
        "context=\"a,addr=1.2.3.4\",addr=1.2.3.4",
        "context=a,b",
        "context=\"a\"b\"",
        "context=\"\"",
        "sec=\"sys\"",
        "fsc=\"a,b\"",
        "context=\"a,addr=1.2.3.4\"",
        "context=\"a",
        "context=a'b",
        "ro\0,rw",
        "ro\nrw",
        "ro, rw",
        "udp",
        "proto=udp",
    ] {
        assert!(bad.parse::<MountOptions>().is_err(), "{bad:?}");
    }
}

#[test]
fn versions_are_tried_from_the_best() {
    let tried = |text: &str| {
        parse(text)
            .versions()
            .iter()
            .map(|v| v.as_str())
            .collect::<Vec<_>>()
            .join(" ")
    };
    assert_eq!(tried(""), "4.2 4.1 4.0 3");
    assert_eq!(tried("nfsvers=4"), "4.2 4.1 4.0");
    assert_eq!(tried("v4.1"), "4.1");
}

#[test]
fn a_minor_version_belongs_to_version_4() {
    for (text, printed) in [
        ("vers=4,minorversion=1", "4.1"),
        ("minorversion=1,vers=4", "4.1"),
        ("nfsvers=4.1,vers=4,minorversion=1", "4.1"),
        ("vers=4.1,minorversion=1", "4.1"),
        ("vers=4,minorversion=0", "4.0"),
        ("minorversion=2", "4.2"),
    ] {
        assert_eq!(parse(text).nfsvers(), Some(printed), "{text}");
        assert_eq!(parse(text), parse(&format!("nfsvers={printed}")));
    }
    assert_eq!(
        error("vers=4.2,minorversion=1"),
        "mount option minorversion=1: expected what nfsvers=4.2 says too; leave one of them out"
    );
    assert!(error("vers=3,minorversion=1").contains("minorversion=1"));
    assert!(error("vers=4,minorversion=3").contains("one of 0, 1, 2"));
}

#[test]
fn labels_are_taken_with_and_without_quotes() {
    let label = "system_u:object_r:container_file_t:s0";
    assert_eq!(
        parse(&format!("context=\"{label}\"")),
        parse(&format!("context={label}"))
    );
    let text = format!("defaults,nolock,context=\"{label}:c1,c2\",ro");
    let options = parse(&text);
    let value = format!("{label}:c1,c2");
    assert!(
        options
            .superblock()
            .any(|word| word == ("context", Some(&*value)))
    );
    assert!(
        options
            .to_string()
            .contains(&format!("context=\"{value}\","))
    );
    assert!(options.texts().contains(&format!("context=\"{value}\"")));
    assert!(options.is_readonly());
    assert_eq!(parse(&options.to_string()), options);
    assert!(error("context=a,c2").contains("not known"));
    assert!(error("context=\"a b\"").contains("white space"));
    assert!(error("context=\"a").contains("does not end"));
}

#[test]
fn how_mountd_was_asked_has_no_effect() {
    assert_eq!(parse("mountproto=udp,mountproto=udp6"), parse(""));
    assert!(error("mountproto=sctp").contains("udp6"));
}

#[test]
fn attributes_belong_to_the_bind_and_not_to_the_share() {
    let readonly = parse("ro,noexec,timeo=50");
    assert_eq!(readonly.share_key(), parse("timeo=50,suid").share_key());
    assert_ne!(readonly.share_key(), parse("timeo=51").share_key());
    assert!(readonly.attributes().contains(
        MountAttrFlags::MOUNT_ATTR_RDONLY
            | MountAttrFlags::MOUNT_ATTR_NOEXEC
            | MountAttrFlags::MOUNT_ATTR_NOSUID
    ));
    let words: Vec<_> = parse("vers=3,port=1,lock,timeo=50,ro")
        .superblock()
        .map(|w| w.0)
        .collect();
    assert_eq!(words, ["hard", "timeo"]);
}

#[test]
fn locks_of_nfs3_stay_on_the_host_unless_asked_for() {
    assert_eq!(parse("").lock_word(), Some("nolock"));
    assert_eq!(parse("lock").lock_word(), Some("lock"));
    assert_eq!(parse("local_lock=flock").lock_word(), None);
}

#[test]
fn every_word_is_listed_once() {
    for (index, (name, ..)) in WORDS.iter().enumerate() {
        assert!(
            WORDS
                .iter()
                .skip(index + 1)
                .all(|(other, ..)| other != name),
            "{name}"
        );
    }
}

fn word() -> impl Strategy<Value = String> {
    prop_oneof![
        (0..WORDS.len()).prop_map(|index| WORDS[index].0.to_owned()),
        ((0..WORDS.len()), "[0-9a-z:.,= \"]{0,5}")
            .prop_map(|(index, value)| format!("{}={value}", WORDS[index].0)),
        ((0..WORDS.len()), 1u32..20)
            .prop_map(|(index, value)| format!("{}={value}", WORDS[index].0)),
    ]
}

proptest! {
    #[test]
    fn what_is_accepted_prints_to_an_equal_value(words in prop::collection::vec(word(), 0..6)) {
        if let Ok(options) = words.join(",").parse::<MountOptions>() {
            let printed = options.to_string();
            prop_assert_eq!(printed.parse::<MountOptions>().unwrap(), options.clone());
            for (name, value) in options.superblock() {
                prop_assert!(name != "addr" && name != "source");
                let value = value.unwrap_or_default();
                prop_assert!(name.ends_with("context") || !value.contains(','));
                prop_assert!(!value.contains('"'));
            }
        }
    }

    #[test]
    fn any_text_is_options_or_an_error(text in "\\PC{0,80}") {
        if let Ok(options) = text.parse::<MountOptions>() {
            prop_assert_eq!(options.to_string().parse::<MountOptions>().unwrap(), options);
        }
    }
}
