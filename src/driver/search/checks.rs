//! What must be true, looked at by somebody who sees the whole disk.

use std::collections::HashSet;

use super::Start;
use super::calls::Do;
use super::disk::Disk;
use super::steps::Mishap;
use super::world::{FRESH, NAMES, World};
use crate::volume::Record;

/// What a user wrote into a volume before the run.
pub(super) const OF_A_USER: &str = "of-a-user";

const VOLUMES: &str = ".nfsvol/volumes";
const TRASH: &str = ".nfsvol/trash";

type Check = Result<(), String>;

fn record(disk: &Disk, dir: &str) -> Option<Record> {
    let json = disk.file(&format!("{dir}/record.json"))?;
    serde_json::from_slice(json).ok()
}

/// The records of volumes, each with its place.
fn volumes(disk: &Disk) -> Vec<(String, Record)> {
    let places = disk.names(VOLUMES).into_iter();
    let places = places.map(|name| format!("{VOLUMES}/{name}"));
    places
        .filter_map(|at| Some((at.clone(), record(disk, &at)?)))
        .collect()
}

/// The records in the trash, each with its entry: of what restores have taken there are several, the
/// newest first.
fn trashed(disk: &Disk) -> Vec<(String, Record)> {
    let mut found = Vec::new();
    for entry in disk.names(TRASH) {
        let entry = format!("{TRASH}/{entry}");
        for begun in disk.names(&entry) {
            let mut at = format!("{entry}/{begun}");
            while is_there(disk, &at) {
                let record = record(disk, &at);
                found.extend(record.map(|record| (entry.clone(), record)));
                at += "/from";
            }
        }
    }
    found
}

/// Whether a record names a place of data.
fn is_known(records: &[(String, Record)], place: &str) -> bool {
    let mut records = records.iter();
    records.any(|(_, record)| record.data_dir.as_str().trim_matches('/') == place)
}

/// The directory that has what a user wrote.
fn place_of_data(disk: &Disk) -> Option<String> {
    let end = format!("/{OF_A_USER}");
    let paths = disk.paths().into_iter();
    let mut places = paths.filter_map(|path| path.strip_suffix(&end).map(str::to_owned));
    Some(places.next()?.trim_start_matches('/').to_owned())
}

fn is_there(disk: &Disk, path: &str) -> bool {
    disk.at(path).is_some()
}

/// Whether another host has ended a host's session, or the server has forgotten it.
fn is_over(disk: &Disk, host: usize) -> bool {
    let tokens = disk.names(&format!(".nfsvol/hosts/{}", NAMES[host]));
    !tokens.iter().any(|token| token.starts_with("alive."))
}

impl World {
    /// At each moment: no volume goes away under its holder, and an exclusive one has one writer.
    pub(super) fn check_holders(&self) -> Check {
        let facts = self.facts.lock().unwrap();
        let disk = &self.wires().disk;
        let mut writers = Vec::new();
        for (number, held) in facts.hosts.iter().enumerate() {
            let host = &self.hosts[number];
            for (volume, held) in held {
                if host.parts.may_write(volume, held, &host.clock) {
                    writers.push((volume, NAMES[number]));
                }
                let forgot = matches!(self.fault, Some(Mishap::Forgets { .. }));
                if forgot || is_over(disk, number) {
                    continue;
                }
                let at = format!("{VOLUMES}/{volume}");
                let there = record(disk, &at).is_some_and(|there| there.id == held.record.id);
                if !there || is_there(disk, &format!("{at}/removing")) {
                    return Err(format!("{volume} goes away under {}", NAMES[number]));
                }
                if !is_there(disk, held.record.data_dir.as_str()) {
                    return Err(format!("{volume} lost its data under {}", NAMES[number]));
                }
            }
        }
        let two = writers.iter().any(|one| {
            writers
                .iter()
                .any(|other| one.0 == other.0 && one.1 != other.1)
        });
        match two && !matches!(self.fault, Some(Mishap::Forgets { .. })) {
            true => Err(format!("two hosts may write: {writers:?}")),
            false => Ok(()),
        }
    }

    /// When all calls have ended, and the hosts have gone on for a while.
    pub(super) fn check_end(&mut self) -> Check {
        self.close();
        let patience = match self.fault {
            Some(Mishap::Death { .. } | Mishap::Pause { .. } | Mishap::Forgets { .. }) => 60,
            // What could not be told is told with the next renewals.
            Some(_) => 10,
            None => 0,
        };
        self.pass(patience, None);
        if matches!(self.fault, Some(Mishap::Forgets { .. })) {
            // By now it is settled whose the volumes are.
            self.fault = None;
            let over = self.check_holders();
            self.fault = Some(Mishap::Forgets { changes: 0 });
            if let Err(wrong) = over
                && wrong.contains("two hosts")
            {
                return Err(wrong);
            }
        }
        self.check_answers()?;
        self.check_disk()?;
        for host in 0..2 {
            let held: Vec<&'static str> = self.facts.lock().unwrap().hosts[host]
                .keys()
                .copied()
                .collect();
            for volume in held {
                self.does(host, Do::Unmount(volume))?;
            }
        }
        self.check_a_fresh_host()
    }

    /// A volume that a Create or a Restore told of is there, or was removed; so of two Restores under two
    /// names one was told that it has nothing.
    fn check_answers(&self) -> Check {
        if matches!(self.fault, Some(Mishap::Forgets { .. })) {
            return Ok(());
        }
        let facts = self.facts.lock().unwrap();
        let disk = &self.wires().disk;
        let (here, removed) = (volumes(disk), trashed(disk));
        let removes = facts
            .results
            .iter()
            .any(|(_, what, _)| matches!(what, Do::Remove(_)))
            || self.hosts.iter().any(|host| host.dead);
        for (host, what, answer) in &facts.results {
            let (Some(name), Ok(id)) = (what.makes(), answer) else {
                continue;
            };
            let at = format!("{VOLUMES}/{name}");
            let is_here = here.iter().any(|(place, r)| *place == at && r.id == *id);
            let is_removed = removed.iter().any(|(_, record)| record.id == *id);
            if !(is_here || (is_removed && removes)) {
                return Err(format!(
                    "{} made {id} ({what:?}), which is gone",
                    NAMES[*host]
                ));
            }
        }
        Ok(())
    }

    /// No record without data, no data without a record.
    fn check_disk(&self) -> Check {
        let disk = &self.wires().disk;
        let (here, trashed) = (volumes(disk), trashed(disk));
        let places = here.iter().chain(&trashed);
        let places: HashSet<_> = places.map(|(at, record)| (at, &record.id)).collect();
        let ids: HashSet<_> = places.iter().map(|(_, id)| id).collect();
        if ids.len() < places.len() {
            return Err(format!("two volumes of one: {places:?}"));
        }
        for (at, record) in &here {
            if *at != format!("{VOLUMES}/{}", record.name) {
                return Err(format!("the record {at} names {}", record.name));
            }
            let removing = is_there(disk, &format!("{at}/removing"));
            let aside = format!(".nfsvol/tmp/{}.data", record.id);
            if !removing && !is_there(disk, record.data_dir.as_str()) && !is_there(disk, &aside) {
                return Err(format!("the record {at} points at nothing"));
            }
        }
        let Some(data) = place_of_data(disk) else {
            return self.without_data("");
        };
        let entry = data
            .strip_suffix("/data")
            .filter(|data| data.starts_with(TRASH));
        let in_trash = entry.is_some_and(|entry| {
            let of = |record: &Record| entry.ends_with(&record.id[..8]);
            trashed.iter().any(|(at, _)| at == entry) || here.iter().any(|(_, record)| of(record))
        });
        match is_known(&here, &data) || is_known(&trashed, &data) || in_trash {
            true => Ok(()),
            false => Err(format!("the user's data in {data} has no record")),
        }
    }

    /// What it means that a user's data is nowhere.
    fn without_data(&self, when: &str) -> Check {
        match self.start {
            Start::Nothing => Ok(()),
            _ => Err(format!("{when}the user's data is gone")),
        }
    }

    /// Whoever comes later can have the volume, and all that was removed.
    fn check_a_fresh_host(&mut self) -> Check {
        let fresh = self.add_host();
        debug_assert_eq!(fresh, FRESH);
        let has = |mode: &str| {
            let there = record(&self.wires().disk, &format!("{VOLUMES}/db"));
            there.is_some_and(|there| {
                there
                    .options
                    .to_map()
                    .get("mode")
                    .is_some_and(|m| m == mode)
            })
        };
        let create = match self.start {
            Start::Exclusive => Do::CreateExclusive("db"),
            _ if has("0700") => Do::Recreate("db"),
            _ => Do::Create("db"),
        };
        for _ in 0..2 {
            for call in [create, Do::Mount("db"), Do::Unmount("db"), Do::Remove("db")] {
                let mut done = self.does(fresh, call);
                if done.is_err() && matches!(self.fault, Some(Mishap::Death { .. })) {
                    // It has seen nothing yet of how long the dead host is silent.
                    self.pass(60, None);
                    done = self.does(fresh, call);
                }
                done.map_err(|error| format!("afterwards: {call:?}: {error}"))?;
            }
        }
        let disk = self.disk();
        let Some(place) = place_of_data(&disk) else {
            return self.without_data("afterwards ");
        };
        let in_trash = place.strip_suffix("/data");
        // Not a volume's that has found the data where it was to have its own.
        let (made, dir) = (disk.at(&place), place.as_str());
        let begun = trashed(&disk).into_iter().find(|(at, record)| {
            let its = record.data_dir.as_str().trim_matches('/') == dir;
            in_trash == Some(at) || its && record.made == made
        });
        // Otherwise it is where a volume has it, or was found.
        let Some((entry, _)) = begun.filter(|_| !is_known(&volumes(&disk), &place)) else {
            return Ok(());
        };
        let entry = entry.rsplit('/').next().unwrap_or_default().to_owned();
        self.alone(fresh, |parts| async move { parts.bring_back(&entry).await });
        match self.disk().at(&format!("back/{OF_A_USER}")) {
            Some(_) => Ok(()),
            None => Err(format!(
                "afterwards the user's data in {place} cannot be restored"
            )),
        }
    }
}
