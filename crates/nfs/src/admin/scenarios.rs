//! What every way to a share must do alike. Each scenario works in a directory of its own and is
//! run over a local directory here, and over real NFS servers in `tests/admin.rs`.

use std::collections::BTreeSet;
use std::sync::atomic::{AtomicU32, Ordering};

use super::{Admin, AdminError, AdminErrorKind, Attr, Kind, Made, SharePath, is_temporary};

pub(crate) async fn all(admin: &Admin) {
    made_once(admin).await;
    absent_is_said_and_not_guessed(admin).await;
    files_are_made_once_and_replaced_whole(admin).await;
    renames(admin).await;
    removals(admin).await;
    listings(admin).await;
    links_are_never_followed(admin).await;
    owners_and_times(admin).await;
    trees(admin).await;
    races_have_one_winner(admin).await;
}

fn at(text: &str) -> SharePath {
    SharePath::parse(text).unwrap()
}

async fn place(admin: &Admin, name: &str) -> SharePath {
    let path = at(name);
    assert!(
        matches!(admin.mkdir(&path, 0o755).await.unwrap(), Made::New(_)),
        "{name}"
    );
    path
}

fn new(made: Made) -> Attr {
    match made {
        Made::New(attr) => attr,
        Made::Exists => panic!("exists"),
    }
}

async fn made_once(admin: &Admin) {
    let dir = place(admin, "made").await;
    let attr = new(admin.mkdir(&dir.join("a"), 0o2770).await.unwrap());
    assert_eq!((attr.kind, attr.mode), (Kind::Dir, 0o2770));
    assert_eq!(
        admin.mkdir(&dir.join("a"), 0o755).await.unwrap(),
        Made::Exists
    );
    assert_eq!(
        admin.mkdir(&SharePath::root(), 0o755).await.unwrap(),
        Made::Exists
    );
    let error = admin.mkdir(&at("made/none/b"), 0o755).await.unwrap_err();
    assert_eq!(error.kind, AdminErrorKind::NotFound);
    admin.create_new(&dir.join("file"), b"").await.unwrap();
    assert_eq!(
        admin.mkdir(&dir.join("file"), 0o755).await.unwrap(),
        Made::Exists
    );
    let error = admin.mkdir(&at("made/file/b"), 0o755).await.unwrap_err();
    assert_eq!(error.kind, AdminErrorKind::NotADirectory);
}

async fn absent_is_said_and_not_guessed(admin: &Admin) {
    let dir = place(admin, "absent").await;
    for path in [dir.join("x"), at("absent/x/y/z")] {
        assert_eq!(admin.attr(&path).await.unwrap(), None);
        assert_eq!(admin.read(&path, 10).await.unwrap(), None);
        assert_eq!(admin.list(&path).await.unwrap(), None);
        assert!(!admin.remove_file(&path).await.unwrap());
        assert!(!admin.remove_dir(&path).await.unwrap());
        assert_eq!(
            admin.touch(&path).await.unwrap_err().kind,
            AdminErrorKind::NotFound
        );
    }
    admin.create_new(&dir.join("file"), b"").await.unwrap();
    let error = admin.attr(&at("absent/file/x")).await.unwrap_err();
    assert_eq!(error.kind, AdminErrorKind::NotADirectory);
    assert_eq!(
        admin.attr(&SharePath::root()).await.unwrap().unwrap().kind,
        Kind::Dir
    );
    assert_eq!(
        admin.attr(&dir).await.unwrap().unwrap().fileid,
        admin.attr(&dir).await.unwrap().unwrap().fileid
    );
}

async fn files_are_made_once_and_replaced_whole(admin: &Admin) {
    let dir = place(admin, "files").await;
    let file = dir.join("record.json");
    let attr = new(admin.create_new(&file, b"first").await.unwrap());
    assert_eq!((attr.kind, attr.mode, attr.size), (Kind::File, 0o644, 5));
    assert_eq!(
        admin.create_new(&file, b"second").await.unwrap(),
        Made::Exists
    );
    assert_eq!(admin.read(&file, 5).await.unwrap().unwrap(), b"first");
    assert_eq!(
        admin.read(&file, 4).await.unwrap_err().kind,
        AdminErrorKind::TooLarge(4)
    );

    let long = vec![7; 3_000_000];
    let attr = admin.write(&file, &long).await.unwrap();
    assert_eq!((attr.mode, attr.size), (0o644, 3_000_000));
    assert_eq!(
        attr.fileid,
        admin.attr(&file).await.unwrap().unwrap().fileid
    );
    assert!(admin.read(&file, 4_000_000).await.unwrap().unwrap() == long);
    admin.write(&file, b"").await.unwrap();
    assert_eq!(admin.read(&file, 0).await.unwrap().unwrap(), b"");

    let sub = dir.join("sub");
    admin.mkdir(&sub, 0o755).await.unwrap();
    assert_eq!(
        admin.write(&sub, b"x").await.unwrap_err().kind,
        AdminErrorKind::Exists
    );
    assert!(admin.read(&sub, 10).await.is_err());
    let error = admin.write(&at("files/none/x"), b"x").await.unwrap_err();
    assert_eq!(error.kind, AdminErrorKind::NotFound);
    let left = admin.list(&dir).await.unwrap().unwrap();
    assert!(
        left.iter().all(|entry| !is_temporary(&entry.name)),
        "{left:?}"
    );
}

async fn renames(admin: &Admin) {
    let dir = place(admin, "renames").await;
    for name in ["a", "b", "empty"] {
        admin.mkdir(&dir.join(name), 0o755).await.unwrap();
    }
    for file in ["renames/a/f", "renames/b/f", "renames/f1", "renames/f2"] {
        admin.create_new(&at(file), file.as_bytes()).await.unwrap();
    }
    let kind = |result: Result<(), AdminError>| result.unwrap_err().kind;
    let (a, b) = (dir.join("a"), dir.join("b"));
    assert_eq!(kind(admin.rename(&a, &b).await), AdminErrorKind::Exists);
    assert_eq!(
        kind(admin.rename(&dir.join("f1"), &b).await),
        AdminErrorKind::Exists
    );
    assert_eq!(
        kind(admin.rename(&a, &dir.join("f1")).await),
        AdminErrorKind::Exists
    );
    assert_eq!(
        kind(admin.rename(&dir.join("x"), &dir.join("y")).await),
        AdminErrorKind::NotFound
    );
    assert_eq!(
        kind(admin.rename(&a, &at("renames/x/y")).await),
        AdminErrorKind::NotFound
    );

    admin
        .rename(&dir.join("f1"), &dir.join("f2"))
        .await
        .unwrap();
    assert_eq!(
        admin.read(&dir.join("f2"), 99).await.unwrap().unwrap(),
        b"renames/f1"
    );
    admin.rename(&a, &dir.join("empty")).await.unwrap();
    admin
        .rename(&dir.join("empty"), &b.join("moved"))
        .await
        .unwrap();
    assert_eq!(
        admin
            .read(&at("renames/b/moved/f"), 99)
            .await
            .unwrap()
            .unwrap(),
        b"renames/a/f"
    );
    assert_eq!(admin.attr(&a).await.unwrap(), None);
    // A handle kept for the old place must not answer for what is there now.
    admin.mkdir(&a, 0o755).await.unwrap();
    assert_eq!(admin.read(&a.join("f"), 99).await.unwrap(), None);
}

async fn removals(admin: &Admin) {
    let dir = place(admin, "removals").await;
    let sub = dir.join("sub");
    admin.mkdir(&sub, 0o755).await.unwrap();
    admin.create_new(&sub.join("f"), b"x").await.unwrap();
    assert_eq!(
        admin.remove_dir(&sub).await.unwrap_err().kind,
        AdminErrorKind::NotEmpty
    );
    assert!(admin.remove_file(&sub).await.is_err());
    let error = admin.remove_dir(&sub.join("f")).await.unwrap_err();
    assert_eq!(error.kind, AdminErrorKind::NotADirectory);
    assert!(admin.remove_file(&sub.join("f")).await.unwrap());
    assert!(!admin.remove_file(&sub.join("f")).await.unwrap());
    assert!(admin.remove_dir(&sub).await.unwrap());
    assert!(!admin.remove_dir(&sub).await.unwrap());
    for root in [
        admin.remove_dir(&SharePath::root()).await.map(|_| ()),
        admin.rename(&SharePath::root(), &dir.join("r")).await,
        admin
            .remove_tree(&SharePath::root(), &|| true)
            .await
            .map(|_| ()),
    ] {
        assert_eq!(root.unwrap_err().kind, AdminErrorKind::Busy);
    }
}

async fn listings(admin: &Admin) {
    let dir = place(admin, "listings").await;
    assert_eq!(admin.list(&dir).await.unwrap().unwrap(), []);
    let names: BTreeSet<String> = (0..700).map(|n| format!("entry-{n:0100}")).collect();
    for name in &names {
        admin.mkdir(&dir.join(name), 0o700).await.unwrap();
    }
    admin.create_new(&dir.join("file"), b"12345").await.unwrap();
    let entries = admin.list(&dir).await.unwrap().unwrap();
    assert_eq!(entries.len(), 701);
    for entry in entries {
        let name = entry.name.into_string().unwrap();
        let attr = entry.attr.unwrap();
        if name == "file" {
            assert_eq!((attr.kind, attr.size), (Kind::File, 5));
        } else {
            assert!(names.contains(&name));
            assert_eq!((attr.kind, attr.mode), (Kind::Dir, 0o700));
        }
    }
    let error = admin.list(&dir.join("file")).await.unwrap_err();
    assert_eq!(error.kind, AdminErrorKind::NotADirectory);
}

/// `links/out` must be a symbolic link to `/etc`, made by the server's side.
async fn links_are_never_followed(admin: &Admin) {
    let link = at("links/out");
    assert_eq!(
        admin.attr(&link).await.unwrap().unwrap().kind,
        Kind::Symlink
    );
    let below = link.join("passwd");
    let kinds = [
        admin.attr(&below).await.unwrap_err().kind,
        admin.read(&below, 1 << 20).await.unwrap_err().kind,
        admin.read(&link, 1 << 20).await.unwrap_err().kind,
        admin.mkdir(&below, 0o755).await.unwrap_err().kind,
        admin.write(&below, b"x").await.unwrap_err().kind,
        admin.remove_file(&below).await.unwrap_err().kind,
        admin.rename(&below, &at("links/x")).await.unwrap_err().kind,
        admin.set_owner(&link, 1, 1, 0o777).await.unwrap_err().kind,
        admin.list(&link).await.unwrap_err().kind,
    ];
    assert!(
        kinds.iter().all(|kind| *kind == AdminErrorKind::Symlink),
        "{kinds:?}"
    );
    assert_eq!(admin.mkdir(&link, 0o755).await.unwrap(), Made::Exists);
    assert_eq!(admin.create_new(&link, b"x").await.unwrap(), Made::Exists);
    let removal = admin.remove_tree(&at("links"), &|| true).await.unwrap();
    assert_eq!((removal.removed, removal.finished), (2, true));
}

async fn owners_and_times(admin: &Admin) {
    let dir = place(admin, "owners").await;
    let before = admin.attr(&dir).await.unwrap().unwrap();
    let attr = admin
        .set_owner(&dir, before.uid, before.gid, 0o1750)
        .await
        .unwrap();
    assert_eq!(attr.mode, 0o1750);
    let again = admin
        .set_owner(&dir, before.uid, before.gid, 0o1750)
        .await
        .unwrap();
    assert_eq!(
        again.ctime, attr.ctime,
        "nothing to change, so nothing is changed"
    );
    if before.uid == 0 {
        let attr = admin.set_owner(&dir, 999, 998, 0o700).await.unwrap();
        assert_eq!((attr.uid, attr.gid, attr.mode), (999, 998, 0o700));
    }
    let file = dir.join("session");
    let first = new(admin.create_new(&file, b"x").await.unwrap());
    let mut touched = first;
    // The clock of a server in a guest may stand still for a moment while the guest is idle.
    for _ in 0..10 {
        tokio::time::sleep(std::time::Duration::from_millis(1100)).await;
        touched = admin.touch(&file).await.unwrap();
        if touched.mtime != first.mtime {
            break;
        }
    }
    let passed = touched.mtime.secs - first.mtime.secs;
    assert!((1..20).contains(&passed), "{first:?} {touched:?}");
    assert_eq!(
        admin.attr(&file).await.unwrap().unwrap().mtime,
        touched.mtime
    );
    let space = admin.space().await.unwrap();
    assert!(space.total >= space.free && space.free >= space.available && space.total > 0);
}

async fn trees(admin: &Admin) {
    let top = place(admin, "trees").await;
    let mut dir = top.clone();
    for _ in 0..20 {
        dir = dir.join("d");
        admin.mkdir(&dir, 0o755).await.unwrap();
        admin.create_new(&dir.join("f"), b"x").await.unwrap();
    }
    for n in 0..300 {
        admin
            .mkdir(&top.join(&format!("n{n}")), 0o755)
            .await
            .unwrap();
    }
    let steps = AtomicU32::new(0);
    let few = || steps.fetch_add(1, Ordering::Relaxed) < 50;
    let part = admin.remove_tree(&top, &few).await.unwrap();
    assert!(!part.finished && part.removed < 341, "{part:?}");
    let rest = admin.remove_tree(&top, &|| true).await.unwrap();
    assert!(rest.finished);
    assert_eq!(part.removed + rest.removed, 341);
    assert_eq!(admin.attr(&top).await.unwrap(), None);
    let none = admin.remove_tree(&top, &|| true).await.unwrap();
    assert_eq!((none.removed, none.finished), (0, true));
}

async fn races_have_one_winner(admin: &Admin) {
    let dir = place(admin, "races").await;
    for round in 0..10 {
        let target = dir.join(&format!("t{round}"));
        let mut contenders = Vec::new();
        for n in 0..6 {
            let (admin, target, dir) = (admin.clone(), target.clone(), dir.clone());
            let own = dir.join(&format!("own-{round}-{n}"));
            admin.mkdir(&own, 0o755).await.unwrap();
            admin
                .create_new(&own.join("who"), n.to_string().as_bytes())
                .await
                .unwrap();
            contenders.push(tokio::spawn(async move {
                let renamed = match admin.rename(&own, &target).await {
                    Ok(()) => true,
                    Err(error) if error.kind == AdminErrorKind::Exists => false,
                    Err(error) => panic!("{error}"),
                };
                let made = admin
                    .mkdir(&dir.join(&format!("m{round}")), 0o755)
                    .await
                    .unwrap();
                let file = dir.join(&format!("c{round}"));
                let created = admin
                    .create_new(&file, n.to_string().as_bytes())
                    .await
                    .unwrap();
                [
                    renamed,
                    matches!(made, Made::New(_)),
                    matches!(created, Made::New(_)),
                ]
            }));
        }
        let mut wins = [0; 3];
        let mut winners = [usize::MAX; 3];
        for (n, contender) in contenders.into_iter().enumerate() {
            for (i, won) in contender.await.unwrap().into_iter().enumerate() {
                wins[i] += u32::from(won);
                if won {
                    winners[i] = n;
                }
            }
        }
        assert_eq!(wins, [1, 1, 1]);
        let who = admin.read(&target.join("who"), 9).await.unwrap().unwrap();
        assert_eq!(who, winners[0].to_string().as_bytes());
        let created = admin
            .read(&dir.join(&format!("c{round}")), 9)
            .await
            .unwrap()
            .unwrap();
        assert_eq!(created, winners[2].to_string().as_bytes());
    }
    assert!(admin.remove_tree(&dir, &|| true).await.unwrap().finished);
}
