//! Each mended fault of the data path is found again when it is put back: by a seed of the
//! simulation, or by a test with a name.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

use crate::mutant::{Mutant, put_back};

use super::{SEEDS, simulate};

/// Those that the seeds of `make test` find, and the first that does. Where that one finds it no
/// more, because the simulation has changed, the others are tried.
const FOUND: &[(Mutant, u64)] = &[
    (Mutant::HeldLeaksBesideReads, 0),
    (Mutant::FsyncOfWritersOnly, 99),
    (Mutant::FlagsOfTheOpen, 47),
    (Mutant::WriteHidesOthers, 68),
    (Mutant::HeirsTakeOverMarks, 7),
    (Mutant::AppendsKeepPages, 102),
    (Mutant::AppendsWaitForTheirPage, 5),
    (Mutant::OpenInFlightIsNone, 18),
    (Mutant::DoubtsKeepSizes, 1503),
    (Mutant::JoinedRoomIsGivenBack, 3731),
];

/// The others: in which file the test is that finds it, and what that file says of it. A trial of the
/// lab is listed by its name, and does not put the fault back: it fails when it is run with
/// `NFSVOL_MUTANT=Name` in its environment, which nobody does but who doubts it.
const NAMED: &[(Mutant, &str, &str)] = &[
    (
        Mutant::LostCallsChangeNothing,
        "src/fuse/simulation/scenarios.rs",
        "put_back(Mutant::LostCallsChangeNothing)",
    ),
    (
        Mutant::KilledCallsAreTakenBack,
        "src/fuse/simulation/scenarios.rs",
        "put_back(Mutant::KilledCallsAreTakenBack)",
    ),
    (
        Mutant::KernelMissesChanges,
        "src/fuse/simulation/scenarios.rs",
        "put_back(Mutant::KernelMissesChanges)",
    ),
    (
        Mutant::CreateTellsOldAttributes,
        "src/fuse/simulation/scenarios.rs",
        "put_back(Mutant::CreateTellsOldAttributes)",
    ),
    (
        Mutant::KilledCutsComeLater,
        "src/fuse/simulation/kills.rs",
        "put_back(Mutant::KilledCutsComeLater)",
    ),
    (
        Mutant::KilledRenamesReplaceLater,
        "src/fuse/simulation/kills.rs",
        "put_back(Mutant::KilledRenamesReplaceLater)",
    ),
    (
        Mutant::LooksPassKilledChanges,
        "src/fuse/simulation/kills.rs",
        "put_back(Mutant::LooksPassKilledChanges)",
    ),
    (
        Mutant::ChangedDirsAreForgotten,
        "src/fuse/simulation/kills.rs",
        "put_back(Mutant::ChangedDirsAreForgotten)",
    ),
    (
        Mutant::ListingsOutliveChanges,
        "src/fuse/simulation/kills.rs",
        "put_back(Mutant::ListingsOutliveChanges)",
    ),
    (
        Mutant::HiddenGoesUnseen,
        "src/fuse/simulation/steps.rs",
        "put_back(Mutant::HiddenGoesUnseen)",
    ),
    (
        Mutant::OldAnswersName,
        "src/fuse/simulation/steps.rs",
        "put_back(Mutant::OldAnswersName)",
    ),
    (
        Mutant::DirtyByNodeId,
        "src/fuse/simulation/steps.rs",
        "put_back(Mutant::DirtyByNodeId)",
    ),
    (
        Mutant::FailedRenameDeletes,
        "src/fuse/simulation/steps.rs",
        "put_back(Mutant::FailedRenameDeletes)",
    ),
    (
        Mutant::WaitsNeverEnd,
        "src/fuse/simulation/scenarios.rs",
        "put_back(Mutant::WaitsNeverEnd)",
    ),
    (
        Mutant::ErrorsForWritersOnly,
        "src/fuse/simulation/scenarios.rs",
        "put_back(Mutant::ErrorsForWritersOnly)",
    ),
    (
        Mutant::AppendsAskBeforeTheirTurn,
        "src/fuse/simulation/steps.rs",
        "put_back(Mutant::AppendsAskBeforeTheirTurn)",
    ),
    (
        Mutant::RenameOfUnknownOutcomeDeletes,
        "src/fuse/simulation/steps.rs",
        "put_back(Mutant::RenameOfUnknownOutcomeDeletes)",
    ),
    (
        Mutant::UnansweredRenamesAreRefused,
        "src/fuse/simulation/steps.rs",
        "put_back(Mutant::UnansweredRenamesAreRefused)",
    ),
    (
        Mutant::LateOpensDoNotWait,
        "src/fuse/simulation/steps.rs",
        "for fault in [Mutant::LateOpensDoNotWait,",
    ),
    (
        Mutant::LateLooksAreForgotten,
        "src/fuse/simulation/steps.rs",
        ", Mutant::LateLooksAreForgotten]",
    ),
    (
        Mutant::KilledRenamesAreForgotten,
        "src/fuse/simulation/kills.rs",
        "put_back(Mutant::KilledRenamesAreForgotten)",
    ),
    (
        Mutant::SetattrHidesOthers,
        "src/fuse/attr.rs",
        "(Mutant::SetattrHidesOthers, Own::Set)",
    ),
    (
        Mutant::OldAnswersEndDoubts,
        "src/fuse/attr.rs",
        "put_back(Mutant::OldAnswersEndDoubts)",
    ),
    (
        Mutant::RestsWaitToBeForced,
        "src/fuse/extents/tests.rs",
        "put_back(Mutant::RestsWaitToBeForced)",
    ),
    (
        Mutant::PiecesCostNothing,
        "src/fuse/simulation/pressure.rs",
        "put_back(Mutant::PiecesCostNothing)",
    ),
    (
        Mutant::WaitersWalkAllFiles,
        "src/fuse/simulation/pressure.rs",
        "put_back(Mutant::WaitersWalkAllFiles)",
    ),
    (
        Mutant::NamesSeenAgainAreNew,
        "src/fuse/inode.rs",
        "put_back(Mutant::NamesSeenAgainAreNew)",
    ),
    (
        Mutant::TargetsInTwoSteps,
        "src/fuse/simulation/pressure.rs",
        "Some(Mutant::TargetsInTwoSteps)",
    ),
    (
        Mutant::PartsKeepTheWhole,
        "src/fuse/extents/buffer.rs",
        "put_back(Mutant::PartsKeepTheWhole)",
    ),
    (
        Mutant::NothingIsForgotten,
        "tests/fuse/memory.rs",
        "known_files_are_bounded",
    ),
    (
        Mutant::CopiesUnbounded,
        "tests/fuse/memory.rs",
        "waiting_writers_are_bounded",
    ),
    (
        Mutant::BadCookieEnds,
        "src/fuse/dir/tests.rs",
        "put_back(Mutant::BadCookieEnds)",
    ),
    (
        Mutant::EmptyAnswersEnd,
        "src/fuse/dir/tests.rs",
        "put_back(Mutant::EmptyAnswersEnd)",
    ),
    (
        Mutant::ReaddirplusOnly,
        "src/fuse/dir/tests.rs",
        "put_back(Mutant::ReaddirplusOnly)",
    ),
    (
        Mutant::HighFileIdsAreOwn,
        "src/fuse/inode.rs",
        "put_back(Mutant::HighFileIdsAreOwn)",
    ),
    // In the guest with Linux 6.1: newer kernels do without the mend.
    (
        Mutant::UncachedIsUnmapped,
        "tests/fuse/consistency.rs",
        "maps_without_attribute_caches",
    ),
    (
        Mutant::DurableHidesOthers,
        "src/fuse/extents/tests.rs",
        "put_back(Mutant::DurableHidesOthers)",
    ),
    (
        Mutant::StartHearsNothing,
        "tests/fuse/faults.rs",
        "a_right_prolonged_during_the_start_counts",
    ),
    (
        Mutant::DeafToKills,
        "tests/fuse/faults.rs",
        "a_killed_writer_that_waits_for_memory_ends",
    ),
    (
        Mutant::ModeBitsAlone,
        "tests/fuse/consistency.rs",
        "where_the_server_squashes_it_decides",
    ),
];

#[test]
fn each_mended_fault_is_found_when_it_is_put_back() {
    let next = AtomicUsize::new(0);
    let missed = Mutex::new(Vec::new());
    std::thread::scope(|scope| {
        for _ in 0..std::thread::available_parallelism().map_or(1, usize::from) {
            scope.spawn(|| {
                while let Some((mutant, first)) = FOUND.get(next.fetch_add(1, Ordering::Relaxed)) {
                    let _back = put_back(*mutant);
                    let mut seeds = std::iter::once(*first).chain(SEEDS);
                    let found = seeds.find_map(|seed| Some((seed, simulate(seed, false).err()?.0)));
                    match found {
                        Some((seed, failure)) => println!("{mutant:?}: seed {seed}: {failure}"),
                        None => missed.lock().unwrap().push(*mutant),
                    }
                }
            });
        }
    });
    let missed = missed.into_inner().unwrap();
    assert!(missed.is_empty(), "no seed finds {missed:?}");
}

/// Whatever the code of a directory asks for by `is_on`.
fn asked_for(directory: &Path, names: &mut BTreeSet<String>) {
    for entry in fs::read_dir(directory).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            asked_for(&path, names);
            continue;
        }
        let text = fs::read_to_string(path).unwrap();
        let asked = text.split("is_on(Mutant::").skip(1);
        let name = |rest: &str| {
            let end = rest.find(|c: char| !c.is_alphanumeric()).unwrap_or(0);
            rest[..end].to_owned()
        };
        names.extend(asked.map(name).filter(|name| !name.is_empty()));
    }
}

#[test]
fn whatever_fault_the_data_path_can_have_back_is_found_somewhere() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut names = BTreeSet::new();
    asked_for(&root.join("src/fuse"), &mut names);
    let found = FOUND.iter().map(|(mutant, _)| *mutant);
    let named = NAMED.iter().map(|(mutant, ..)| *mutant);
    for mutant in found.chain(named) {
        names.remove(&format!("{mutant:?}"));
    }
    assert!(names.is_empty(), "nothing is said to find {names:?}");
    for (mutant, file, test) in NAMED {
        let text = fs::read_to_string(root.join(file)).unwrap();
        assert!(text.contains(test), "{mutant:?}: {file} has no {test}");
        let is_trial = file.starts_with("tests/");
        let is_named = test.contains(&format!("Mutant::{mutant:?}"));
        assert!(is_trial || is_named, "{test} does not put {mutant:?} back");
    }
}
