//! What a user is told by the commands, where no daemon runs.

use std::process::{Command, Output};

/// Of which nobody listens; no server is there either.
const SOCKET: &str = "/nowhere/of-the-environment.sock";
const SHARE: &str = "127.0.0.1:/nowhere";

/// Runs `nfsvol` with these arguments, and with a socket's name in the environment.
fn nfsvol(args: &str) -> (i32, String) {
    let args = args.split(' ').map(|arg| arg.trim_matches('\''));
    let said: Output = Command::new(env!("CARGO_BIN_EXE_nfsvol"))
        .args(args)
        .env("NFSVOL_SOCKET", SOCKET)
        .output()
        .expect("nfsvol runs");
    let stderr = String::from_utf8_lossy(&said.stderr);
    let text = stderr.split_whitespace().collect::<Vec<_>>().join(" ");
    (said.status.code().unwrap_or(-1), text)
}

/// Wrong usage, with its reason.
fn refused(args: &str, reason: &str) {
    let (code, said) = nfsvol(args);
    assert!(code == 2 && said.contains(reason), "{args}: {code} {said}");
}

#[test]
fn a_flag_wins_over_the_environment() {
    let (code, said) = nfsvol("ls");
    assert!(code == 1 && said.contains(SOCKET), "{code} {said}");
    let (code, said) = nfsvol("ls --socket /nowhere/flag.sock");
    assert!(code == 1 && said.contains("flag.sock"), "{code} {said}");
    for command in [
        "ls",
        "trash ls",
        "restore db",
        "trash purge --all",
        "adopt db",
    ] {
        let (code, said) = nfsvol(&format!("{command} --share {SHARE}"));
        assert_eq!(code, 1, "{command}: {said}");
        assert!(!said.contains(SOCKET), "{command}: {said}");
    }
    refused(
        &format!("ls --share {SHARE} --socket /x"),
        "cannot be used with",
    );
}

#[test]
fn what_only_a_daemon_knows_is_asked_of_no_share() {
    refused(&format!("status --share {SHARE}"), "'--share'");
    refused(&format!("abort db --share {SHARE}"), "'--share'");
}

#[test]
fn a_purge_of_nothing_in_particular_is_told_of_all() {
    refused("trash purge", "<NAME|--all>");
    refused("trash purge db --all", "cannot be used with");
}

#[test]
fn a_filter_that_would_silence_the_log_is_refused_with_its_reason_once() {
    for (filter, reason) in [
        ("''", "\"\" is not a log filter"),
        ("loud", "\"loud\" is not a log filter"),
        ("info,nfsvol::plugni=debug", "no module \"nfsvol::plugni\""),
    ] {
        let (code, said) = nfsvol(&format!("serve --state-dir /proc/none --log {filter}"));
        assert!(code == 1 && said.contains(reason), "{code} {said}");
        assert!(!said.contains("level filter"), "{said}");
    }
}

#[test]
fn the_root_of_this_host_is_no_share() {
    for share in ["embedded:/", "embedded:///."] {
        refused(
            &format!("serve --state-dir /proc/none --share {share}"),
            "embedded:/srv/volumes",
        );
    }
}
