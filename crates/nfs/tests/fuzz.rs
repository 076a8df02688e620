//! The fuzz targets on random input, on the corpus, and on the corpus with a few bytes changed.

#[path = "../fuzz/targets.rs"]
mod targets;

use std::path::Path;

use proptest::prelude::*;

/// Cases for each target; `NFSVOL_FUZZ_CASES` sets another number.
fn cases(default: u32) -> ProptestConfig {
    let cases = std::env::var("NFSVOL_FUZZ_CASES");
    ProptestConfig {
        cases: cases.map_or(default, |n| n.parse().expect("a number of cases")),
        failure_persistence: None,
        ..ProptestConfig::default()
    }
}

fn corpus(target: &str) -> Vec<Vec<u8>> {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("fuzz/corpus")
        .join(target);
    let files = std::fs::read_dir(&dir).expect("the corpus is part of the repository");
    let read = |file: std::io::Result<std::fs::DirEntry>| std::fs::read(file?.path());
    let mut inputs: Vec<_> = files
        .map(|file| read(file).expect("the corpus is readable"))
        .collect();
    inputs.sort();
    assert!(!inputs.is_empty(), "{} holds nothing", dir.display());
    inputs
}

/// Bytes, or words of the kind that XDR is full of.
fn input() -> impl Strategy<Value = Vec<u8>> {
    let word = prop_oneof![
        6 => 0u32..3,
        2 => 3u32..70,
        2 => (0u32..40).prop_map(|length| length | 0x8000_0000),
        2 => (0u32..6).prop_map(|call| 0xfe00_0000 | call << 16),
        1 => Just(u32::MAX),
        1 => any::<u32>(),
    ];
    let words = proptest::collection::vec(word, 0..60)
        .prop_map(|words| words.into_iter().flat_map(u32::to_be_bytes).collect());
    prop_oneof![proptest::collection::vec(any::<u8>(), 0..200), words]
}

/// An input of the corpus with bytes changed, and its end cut off.
fn changed(target: &str) -> impl Strategy<Value = Vec<u8>> + use<> {
    let changes = proptest::collection::vec(
        (
            any::<prop::sample::Index>(),
            prop_oneof![0u8..6, any::<u8>()],
        ),
        0..6,
    );
    let from = prop::sample::select(corpus(target));
    (from, changes, 0usize..40).prop_map(|(mut input, changes, cut)| {
        for (at, byte) in changes {
            if !input.is_empty() {
                let at = at.index(input.len());
                input[at] = byte;
            }
        }
        let keep = if cut < 20 {
            input.len()
        } else {
            input.len().saturating_sub(cut - 20)
        };
        input.truncate(keep);
        input
    })
}

fn run(target: &'static str, cases: ProptestConfig, run: fn(&[u8])) {
    for input in corpus(target) {
        run(&input);
    }
    let mut runner = proptest::test_runner::TestRunner::new(cases);
    let inputs = prop_oneof![input(), changed(target)];
    let outcome = runner.run(&inputs, |input| {
        run(&input);
        Ok(())
    });
    if let Err(e) = outcome {
        panic!("{target}: {e}");
    }
}

#[test]
fn records() {
    run("records", cases(5_000), targets::records);
}

#[test]
fn replies() {
    run("replies", cases(20_000), targets::replies);
}

#[test]
fn sessions() {
    run("sessions", cases(400), targets::sessions);
}
