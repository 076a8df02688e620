//! The server over real sockets, spoken to with `nfs3_client`.

use std::collections::BTreeSet;
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt};

use nfs3_client::Nfs3ConnectionBuilder;
use nfs3_client::tokio::{TokioConnector, TokioIo};
use nfs3_types::nfs3::{
    ACCESS3_MODIFY, ACCESS3_READ, ACCESS3args, ACCESS3res, COMMIT3args, CREATE3args, FSSTAT3args,
    GETATTR3args, LINK3args, LOOKUP3args, MKDIR3args, MKNOD3args, Nfs3Option, Nfs3Result,
    PATHCONF3args, READ3args, READDIR3args, READDIRPLUS3args, READLINK3args, REMOVE3args,
    RENAME3args, RMDIR3args, SETATTR3args, SYMLINK3args, WRITE3args, cookieverf3, createhow3,
    createverf3, diropargs3, fattr3, filename3, ftype3, mknoddata3, nfs_fh3, nfspath3, nfsstat3,
    nfstime3, sattr3, sattrguard3, set_atime, set_gid3, set_mode3, set_mtime, set_size3, set_uid3,
    specdata3, stable_how, symlinkdata3,
};
use nfs3_types::rpc::{auth_unix, opaque_auth};
use nfs3_types::xdr_codec::Opaque;
use tokio::net::TcpStream;

use super::*;

type Client = nfs3_client::Nfs3Client<TokioIo<TcpStream>>;

struct Lab {
    dir: tempfile::TempDir,
    state: tempfile::TempDir,
    server: EmbeddedServer,
}

async fn start(dir: &Path, state: &Path, privileged_only: bool) -> EmbeddedServer {
    let settings = Settings {
        state_dir: state.to_owned(),
        privileged_only,
    };
    serve(dir, "127.0.0.1:0".parse().unwrap(), &settings)
        .await
        .unwrap()
}

/// A server on a fresh directory. The tests need root, as the server does.
async fn lab() -> Option<Lab> {
    if !rustix::process::geteuid().is_root() {
        assert!(
            std::env::var_os("NFSVOL_TEST_REQUIRE_ALL").is_none(),
            "the embedded server's tests need root"
        );
        eprintln!("skipped: needs root");
        return None;
    }
    let (dir, state) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    // Other users get in, as in a share.
    std::fs::set_permissions(dir.path(), PermissionsExt::from_mode(0o777)).unwrap();
    let server = start(dir.path(), state.path(), false).await;
    Some(Lab { dir, state, server })
}

impl Lab {
    async fn client(&self) -> (Client, nfs_fh3) {
        self.client_as(0, 0, &[]).await
    }

    async fn client_as(&self, uid: u32, gid: u32, groups: &[u32]) -> (Client, nfs_fh3) {
        connect(self.server.addr, self.dir.path(), uid, gid, groups).await
    }
}

async fn connect(
    addr: SocketAddr,
    dir: &Path,
    uid: u32,
    gid: u32,
    groups: &[u32],
) -> (Client, nfs_fh3) {
    let auth = auth_unix {
        stamp: 0,
        machinename: Opaque::borrowed(b"test"),
        uid,
        gid,
        gids: groups.to_vec(),
    };
    let connection = Nfs3ConnectionBuilder::new(TokioConnector, "127.0.0.1", dir.to_str().unwrap())
        .portmapper_port(addr.port())
        .connect_from_privileged_port(false)
        .credential(opaque_auth::auth_unix(&auth))
        .mount()
        .await
        .unwrap();
    let root = connection.root_nfs_fh3();
    (connection.into_nfs3_client(), root)
}

fn at<'a>(dir: &nfs_fh3, name: &'a [u8]) -> diropargs3<'a> {
    diropargs3 {
        dir: dir.clone(),
        name: filename3(Opaque::borrowed(name)),
    }
}

fn outcome<T, E>(result: Nfs3Result<T, E>) -> Result<T, nfsstat3> {
    match result {
        Nfs3Result::Ok(ok) => Ok(ok),
        Nfs3Result::Err((status, _)) => Err(status),
    }
}

fn mode(mode: u32) -> sattr3 {
    sattr3 {
        mode: set_mode3::Some(mode),
        ..sattr3::default()
    }
}

async fn create(
    client: &mut Client,
    dir: &nfs_fh3,
    name: &[u8],
    how: createhow3,
) -> Result<nfs_fh3, nfsstat3> {
    let args = CREATE3args {
        where_: at(dir, name),
        how,
    };
    outcome(client.create(&args).await.unwrap()).map(|ok| ok.obj.unwrap())
}

async fn file(client: &mut Client, dir: &nfs_fh3, name: &[u8]) -> nfs_fh3 {
    create(client, dir, name, createhow3::GUARDED(mode(0o644)))
        .await
        .unwrap()
}

async fn mkdir(client: &mut Client, dir: &nfs_fh3, name: &[u8]) -> Result<nfs_fh3, nfsstat3> {
    let args = MKDIR3args {
        where_: at(dir, name),
        attributes: mode(0o755),
    };
    outcome(client.mkdir(&args).await.unwrap()).map(|ok| ok.obj.unwrap())
}

async fn lookup(client: &mut Client, dir: &nfs_fh3, name: &[u8]) -> Result<nfs_fh3, nfsstat3> {
    let args = LOOKUP3args {
        what: at(dir, name),
    };
    outcome(client.lookup(&args).await.unwrap()).map(|ok| ok.object)
}

async fn attributes(client: &mut Client, object: &nfs_fh3) -> Result<fattr3, nfsstat3> {
    let args = GETATTR3args {
        object: object.clone(),
    };
    outcome(client.getattr(&args).await.unwrap()).map(|ok| ok.obj_attributes)
}

async fn write(
    client: &mut Client,
    file: &nfs_fh3,
    offset: u64,
    data: &[u8],
    stable: stable_how,
) -> Result<[u8; 8], nfsstat3> {
    let args = WRITE3args {
        file: file.clone(),
        offset,
        count: u32::try_from(data.len()).unwrap(),
        stable,
        data: Opaque::borrowed(data),
    };
    outcome(client.write(&args).await.unwrap()).map(|ok| ok.verf.0)
}

async fn read(
    client: &mut Client,
    file: &nfs_fh3,
    offset: u64,
    count: u32,
) -> Result<(Vec<u8>, bool), nfsstat3> {
    let args = READ3args {
        file: file.clone(),
        offset,
        count,
    };
    outcome(client.read(&args).await.unwrap()).map(|ok| (ok.data.into_owned(), ok.eof))
}

async fn rename(
    client: &mut Client,
    dir: &nfs_fh3,
    from: &[u8],
    to: &[u8],
) -> Result<(), nfsstat3> {
    let args = RENAME3args {
        from: at(dir, from),
        to: at(dir, to),
    };
    outcome(client.rename(&args).await.unwrap()).map(drop)
}

#[tokio::test(flavor = "multi_thread")]
async fn of_many_who_make_a_directory_one_wins() {
    let Some(lab) = lab().await else { return };
    for round in 0..20 {
        let name = format!("vol{round}").into_bytes();
        let mut racers = tokio::task::JoinSet::new();
        for _ in 0..4 {
            let (mut client, root) = lab.client().await;
            let name = name.clone();
            racers.spawn(async move { mkdir(&mut client, &root, &name).await });
        }
        let outcomes = racers.join_all().await;
        assert_eq!(
            outcomes.iter().filter(|o| o.is_ok()).count(),
            1,
            "{outcomes:?}"
        );
        assert!(
            outcomes
                .iter()
                .flat_map(|o| o.as_ref().err())
                .all(|&e| e == nfsstat3::NFS3ERR_EXIST)
        );
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn of_many_guarded_creates_one_wins() {
    let Some(lab) = lab().await else { return };
    for round in 0..20 {
        let name = format!("file{round}").into_bytes();
        let mut racers = tokio::task::JoinSet::new();
        for _ in 0..4 {
            let (mut client, root) = lab.client().await;
            let name = name.clone();
            racers.spawn(async move {
                create(&mut client, &root, &name, createhow3::GUARDED(mode(0o600))).await
            });
        }
        let outcomes = racers.join_all().await;
        assert_eq!(
            outcomes.iter().filter(|o| o.is_ok()).count(),
            1,
            "{outcomes:?}"
        );
    }
}

#[tokio::test]
async fn an_exclusive_create_knows_its_own_retransmission_also_after_a_restart() {
    let Some(mut lab) = lab().await else { return };
    let exclusive = |v| createhow3::EXCLUSIVE(createverf3(v));
    let (mut client, root) = lab.client().await;
    // With the top bits set, which are not kept.
    let own = [0xff, 2, 3, 4, 0xfe, 6, 7, 8];
    let made = create(&mut client, &root, b"lock", exclusive(own))
        .await
        .unwrap();
    assert_eq!(
        create(&mut client, &root, b"lock", exclusive(own))
            .await
            .as_ref(),
        Ok(&made)
    );
    let other = create(&mut client, &root, b"lock", exclusive([9; 8])).await;
    assert_eq!(other, Err(nfsstat3::NFS3ERR_EXIST));

    lab.server.shutdown().await;
    lab.server = start(lab.dir.path(), lab.state.path(), false).await;
    let (mut client, root) = lab.client().await;
    assert_eq!(
        create(&mut client, &root, b"lock", exclusive(own))
            .await
            .as_ref(),
        Ok(&made)
    );

    // Once it has content it is somebody's file, whatever its times are.
    write(&mut client, &made, 0, b"x", stable_how::FILE_SYNC)
        .await
        .unwrap();
    let full = create(&mut client, &root, b"lock", exclusive(own)).await;
    assert_eq!(full, Err(nfsstat3::NFS3ERR_EXIST));
}

#[tokio::test]
async fn unchecked_create_takes_what_is_there_and_truncates_only_when_told() {
    let Some(lab) = lab().await else { return };
    let (mut client, root) = lab.client().await;
    let first = file(&mut client, &root, b"f").await;
    write(&mut client, &first, 0, b"content", stable_how::FILE_SYNC)
        .await
        .unwrap();
    let again = create(&mut client, &root, b"f", createhow3::UNCHECKED(mode(0o600))).await;
    assert_eq!(again.as_ref(), Ok(&first));
    assert_eq!(attributes(&mut client, &first).await.unwrap().size, 7);
    let empty = sattr3 {
        size: set_size3::Some(0),
        ..sattr3::default()
    };
    create(&mut client, &root, b"f", createhow3::UNCHECKED(empty))
        .await
        .unwrap();
    assert_eq!(attributes(&mut client, &first).await.unwrap().size, 0);
    mkdir(&mut client, &root, b"d").await.unwrap();
    let over = create(&mut client, &root, b"d", createhow3::UNCHECKED(mode(0o600))).await;
    assert_eq!(over, Err(nfsstat3::NFS3ERR_EXIST));
}

#[tokio::test]
async fn rename_replaces_as_posix_says() {
    let Some(lab) = lab().await else { return };
    let (mut client, root) = lab.client().await;
    for name in [b"a", b"b", b"c"] {
        mkdir(&mut client, &root, name).await.unwrap();
    }
    let b = lookup(&mut client, &root, b"b").await.unwrap();
    file(&mut client, &b, b"inside").await;
    file(&mut client, &root, b"f").await;
    assert_eq!(
        rename(&mut client, &root, b"a", b"b").await,
        Err(nfsstat3::NFS3ERR_NOTEMPTY)
    );
    assert_eq!(rename(&mut client, &root, b"b", b"a").await, Ok(()));
    assert_eq!(lookup(&mut client, &root, b"a").await, Ok(b.clone()));
    assert_eq!(
        lookup(&mut client, &root, b"b").await,
        Err(nfsstat3::NFS3ERR_NOENT)
    );
    assert_eq!(
        rename(&mut client, &root, b"c", b"f").await,
        Err(nfsstat3::NFS3ERR_NOTDIR)
    );
    assert_eq!(
        rename(&mut client, &root, b"f", b"c").await,
        Err(nfsstat3::NFS3ERR_ISDIR)
    );
    assert_eq!(
        rename(&mut client, &root, b"none", b"x").await,
        Err(nfsstat3::NFS3ERR_NOENT)
    );
    assert_eq!(
        rename(&mut client, &root, b".", b"x").await,
        Err(nfsstat3::NFS3ERR_INVAL)
    );
    // The old file goes, the new one keeps its handle.
    let old = file(&mut client, &root, b"old").await;
    let new = file(&mut client, &root, b"new").await;
    rename(&mut client, &root, b"new", b"old").await.unwrap();
    assert_eq!(lookup(&mut client, &root, b"old").await.as_ref(), Ok(&new));
    assert_eq!(
        attributes(&mut client, &old).await.unwrap_err(),
        nfsstat3::NFS3ERR_STALE
    );
}

#[tokio::test]
async fn handles_survive_renames_and_restarts_and_the_verifier_does_not() {
    let Some(mut lab) = lab().await else { return };
    let (mut client, root) = lab.client().await;
    let kept = file(&mut client, &root, b"kept").await;
    let before = write(&mut client, &kept, 0, b"data", stable_how::UNSTABLE)
        .await
        .unwrap();
    let gone = file(&mut client, &root, b"gone").await;
    rename(&mut client, &root, b"kept", b"moved").await.unwrap();
    let args = REMOVE3args {
        object: at(&root, b"gone"),
    };
    outcome(client.remove(&args).await.unwrap()).unwrap();

    lab.server.shutdown().await;
    lab.server = start(lab.dir.path(), lab.state.path(), false).await;
    let (mut client, root_again) = lab.client().await;
    assert_eq!(root_again, root);
    assert_eq!(
        read(&mut client, &kept, 0, 100).await.unwrap(),
        (b"data".to_vec(), true)
    );
    assert_eq!(
        attributes(&mut client, &gone).await.unwrap_err(),
        nfsstat3::NFS3ERR_STALE
    );
    let args = COMMIT3args {
        file: kept.clone(),
        offset: 0,
        count: 0,
    };
    let after = outcome(client.commit(&args).await.unwrap()).unwrap().verf.0;
    assert_ne!(before, after);
}

#[tokio::test]
async fn a_made_up_handle_opens_nothing() {
    let Some(lab) = lab().await else { return };
    let (mut client, root) = lab.client().await;
    // The root of the file system below has a handle too, but not from this server's key.
    let other = tempfile::tempdir().unwrap();
    let server = start(lab.dir.path(), other.path(), false).await;
    let (_, foreign) = connect(server.addr, lab.dir.path(), 0, 0, &[]).await;
    assert_eq!(
        attributes(&mut client, &foreign).await.unwrap_err(),
        nfsstat3::NFS3ERR_BADHANDLE
    );
    let mut bytes = root.data.to_vec();
    bytes[8] ^= 1;
    let forged = nfs_fh3 {
        data: Opaque::owned(bytes),
    };
    assert_eq!(
        attributes(&mut client, &forged).await.unwrap_err(),
        nfsstat3::NFS3ERR_BADHANDLE
    );
    server.shutdown().await;
}

#[tokio::test]
async fn nothing_leads_out_of_the_directory() {
    let Some(lab) = lab().await else { return };
    let (mut client, root) = lab.client().await;
    assert_eq!(lookup(&mut client, &root, b"..").await.as_ref(), Ok(&root));
    for name in [&b"../x"[..], b"a/b", b"", b"x\0y"] {
        assert_eq!(
            lookup(&mut client, &root, name).await,
            Err(nfsstat3::NFS3ERR_INVAL),
            "{name:?}"
        );
    }
    let args = SYMLINK3args {
        where_: at(&root, b"out"),
        symlink: symlinkdata3 {
            symlink_attributes: sattr3::default(),
            symlink_data: nfspath3(Opaque::borrowed(b"/etc")),
        },
    };
    let link = outcome(client.symlink(&args).await.unwrap())
        .unwrap()
        .obj
        .unwrap();
    assert_eq!(
        attributes(&mut client, &link).await.unwrap().type_,
        ftype3::NF3LNK
    );
    let target = client
        .readlink(&READLINK3args {
            symlink: link.clone(),
        })
        .await
        .unwrap();
    assert_eq!(outcome(target).unwrap().data.0.as_ref(), b"/etc");
    // A link is a link: nothing is found through it, nothing is made or changed through it.
    assert_eq!(
        lookup(&mut client, &link, b"passwd").await,
        Err(nfsstat3::NFS3ERR_NOTDIR)
    );
    let over = create(
        &mut client,
        &root,
        b"out",
        createhow3::UNCHECKED(mode(0o600)),
    )
    .await;
    assert_eq!(over, Err(nfsstat3::NFS3ERR_EXIST));
    assert_eq!(
        read(&mut client, &link, 0, 10).await,
        Err(nfsstat3::NFS3ERR_INVAL)
    );
    let mount = |path: String| {
        Nfs3ConnectionBuilder::new(TokioConnector, "127.0.0.1", path)
            .portmapper_port(lab.server.addr.port())
            .connect_from_privileged_port(false)
            .mount()
    };
    let dir = lab.dir.path().to_str().unwrap();
    mkdir(&mut client, &root, b"sub").await.unwrap();
    assert!(mount(format!("{dir}/sub/")).await.is_ok());
    for path in [
        "/",
        "/etc",
        &format!("{dir}/out"),
        &format!("{dir}/../"),
        &format!("{dir}x"),
    ] {
        assert!(mount(path.to_owned()).await.is_err(), "{path}");
    }
}

#[tokio::test]
async fn the_callers_user_owns_what_it_makes_and_the_kernel_checks_its_rights() {
    let Some(lab) = lab().await else { return };
    let (mut root_client, root) = lab.client().await;
    let (mut alice, _) = lab.client_as(1000, 1000, &[]).await;
    let (mut bob, _) = lab.client_as(1001, 1001, &[2000]).await;
    let own = create(&mut alice, &root, b"own", createhow3::GUARDED(mode(0o400)))
        .await
        .unwrap();
    let made = attributes(&mut alice, &own).await.unwrap();
    assert_eq!((made.uid, made.gid, made.mode), (1000, 1000, 0o400));
    // Its maker writes it whatever its mode: the descriptor was open for writing.
    write(&mut alice, &own, 0, b"secret", stable_how::UNSTABLE)
        .await
        .unwrap();
    assert_eq!(
        read(&mut bob, &own, 0, 9).await,
        Err(nfsstat3::NFS3ERR_ACCES)
    );
    let access = ACCESS3args {
        object: own.clone(),
        access: ACCESS3_READ | ACCESS3_MODIFY,
    };
    let granted = |reply: ACCESS3res| outcome(reply).unwrap().access;
    assert_eq!(granted(bob.access(&access).await.unwrap()), 0);
    assert_eq!(granted(alice.access(&access).await.unwrap()), ACCESS3_READ);
    assert_eq!(
        granted(root_client.access(&access).await.unwrap()),
        ACCESS3_READ | ACCESS3_MODIFY
    );
    let set = |to| SETATTR3args {
        object: own.clone(),
        new_attributes: to,
        guard: sattrguard3::None,
    };
    let denied = outcome(bob.setattr(&set(mode(0o777))).await.unwrap());
    assert_eq!(denied.unwrap_err(), nfsstat3::NFS3ERR_PERM);
    // A supplementary group counts.
    let give = sattr3 {
        gid: set_gid3::Some(2000),
        ..mode(0o440)
    };
    outcome(root_client.setattr(&set(give)).await.unwrap()).unwrap();
    assert_eq!(read(&mut bob, &own, 0, 9).await.unwrap().0, b"secret");
    // Directories too, and their mode and owner are the caller's.
    let home = mkdir(&mut alice, &root, b"home").await.unwrap();
    let made = attributes(&mut alice, &home).await.unwrap();
    assert_eq!((made.uid, made.gid, made.mode), (1000, 1000, 0o755));
    assert_eq!(
        mkdir(&mut bob, &home, b"x").await,
        Err(nfsstat3::NFS3ERR_ACCES)
    );
    // And the threads are root again afterwards.
    let by_root = file(&mut root_client, &home, b"by-root").await;
    assert_eq!(attributes(&mut root_client, &by_root).await.unwrap().uid, 0);
}

#[tokio::test]
async fn set_id_bits_go_when_somebody_writes_or_cuts() {
    let Some(lab) = lab().await else { return };
    let (mut root_client, root) = lab.client().await;
    let (mut alice, _) = lab.client_as(1000, 1000, &[]).await;
    for name in [&b"written"[..], b"cut"] {
        let how = createhow3::GUARDED(mode(0o6777));
        let file = create(&mut root_client, &root, name, how).await.unwrap();
        let made = attributes(&mut root_client, &file).await.unwrap();
        assert_eq!(made.mode, 0o6777);
        if name == b"cut" {
            let to = SETATTR3args {
                object: file.clone(),
                new_attributes: sattr3 {
                    size: set_size3::Some(0),
                    ..sattr3::default()
                },
                guard: sattrguard3::None,
            };
            outcome(alice.setattr(&to).await.unwrap()).unwrap();
        } else {
            let data = b"not what it was";
            let written = write(&mut alice, &file, 0, data, stable_how::UNSTABLE);
            written.await.unwrap();
        }
        let left = attributes(&mut root_client, &file).await.unwrap();
        assert_eq!(left.mode, 0o777, "{name:?}");
    }
}

#[tokio::test]
async fn setattr_sets_every_field_and_minds_its_guard() {
    let Some(lab) = lab().await else { return };
    let (mut client, root) = lab.client().await;
    let f = file(&mut client, &root, b"f").await;
    let to = sattr3 {
        mode: set_mode3::Some(0o4751),
        uid: set_uid3::Some(1234),
        gid: set_gid3::Some(5678),
        size: set_size3::Some(5 << 30),
        atime: set_atime::SET_TO_CLIENT_TIME(nfstime3 {
            seconds: 4_000_000_000,
            nseconds: 7,
        }),
        mtime: set_mtime::SET_TO_CLIENT_TIME(nfstime3 {
            seconds: 1,
            nseconds: 999_999_999,
        }),
    };
    let ctime = attributes(&mut client, &f).await.unwrap().ctime;
    let stale = nfstime3 {
        seconds: ctime.seconds - 1,
        ..ctime
    };
    let args = |guard| SETATTR3args {
        object: f.clone(),
        new_attributes: to.clone(),
        guard,
    };
    let refused = outcome(
        client
            .setattr(&args(sattrguard3::Some(stale)))
            .await
            .unwrap(),
    );
    assert_eq!(refused.unwrap_err(), nfsstat3::NFS3ERR_NOT_SYNC);
    assert_eq!(attributes(&mut client, &f).await.unwrap().size, 0);
    outcome(
        client
            .setattr(&args(sattrguard3::Some(ctime)))
            .await
            .unwrap(),
    )
    .unwrap();
    let now = attributes(&mut client, &f).await.unwrap();
    assert_eq!(
        (now.mode, now.uid, now.gid, now.size),
        (0o4751, 1234, 5678, 5 << 30)
    );
    assert_eq!(
        now.atime,
        nfstime3 {
            seconds: 4_000_000_000,
            nseconds: 7
        }
    );
    assert_eq!(
        now.mtime,
        nfstime3 {
            seconds: 1,
            nseconds: 999_999_999
        }
    );
    assert_eq!(now.used, 0, "a hole takes no space");
}

#[tokio::test]
async fn data_beyond_4_gib_is_written_committed_and_read() {
    let Some(lab) = lab().await else { return };
    let (mut client, root) = lab.client().await;
    let f = file(&mut client, &root, b"big").await;
    let data: Vec<u8> = (0..100_003_u32).map(|i| (i % 251) as u8).collect();
    let offset = (6 << 30) + 1;
    let wrote = write(&mut client, &f, offset, &data, stable_how::UNSTABLE)
        .await
        .unwrap();
    let args = COMMIT3args {
        file: f.clone(),
        offset: 0,
        count: 0,
    };
    assert_eq!(
        outcome(client.commit(&args).await.unwrap()).unwrap().verf.0,
        wrote
    );
    assert_eq!(
        read(&mut client, &f, offset, 200_000).await.unwrap(),
        (data.clone(), true)
    );
    assert_eq!(
        read(&mut client, &f, offset, 100).await.unwrap(),
        (data[..100].to_vec(), false)
    );
    assert_eq!(
        read(&mut client, &f, offset + 200_000, 10).await.unwrap(),
        (vec![], true)
    );
    assert_eq!(
        read(&mut client, &f, u64::MAX, 10).await,
        Err(nfsstat3::NFS3ERR_INVAL)
    );
    let beyond = write(&mut client, &f, u64::MAX - 1, b"xyz", stable_how::UNSTABLE).await;
    assert_eq!(beyond, Err(nfsstat3::NFS3ERR_FBIG));
    let mut on_disk = vec![0; data.len()];
    let local = std::fs::File::open(lab.dir.path().join("big")).unwrap();
    local.read_exact_at(&mut on_disk, offset).unwrap();
    assert_eq!(on_disk, data);
}

#[tokio::test]
async fn remove_and_rmdir_keep_to_their_kind() {
    let Some(lab) = lab().await else { return };
    let (mut client, root) = lab.client().await;
    let d = mkdir(&mut client, &root, b"d").await.unwrap();
    file(&mut client, &d, b"f").await;
    let rmdir = |name| RMDIR3args {
        object: at(&root, name),
    };
    let remove = REMOVE3args {
        object: at(&root, b"d"),
    };
    let not_empty = outcome(client.rmdir(&rmdir(b"d")).await.unwrap()).unwrap_err();
    assert_eq!(not_empty, nfsstat3::NFS3ERR_NOTEMPTY);
    assert_eq!(
        outcome(client.remove(&remove).await.unwrap()).unwrap_err(),
        nfsstat3::NFS3ERR_ISDIR
    );
    let inside = RMDIR3args {
        object: at(&d, b"f"),
    };
    assert_eq!(
        outcome(client.rmdir(&inside).await.unwrap()).unwrap_err(),
        nfsstat3::NFS3ERR_NOTDIR
    );
    outcome(
        client
            .remove(&REMOVE3args {
                object: at(&d, b"f"),
            })
            .await
            .unwrap(),
    )
    .unwrap();
    outcome(client.rmdir(&rmdir(b"d")).await.unwrap()).unwrap();
    assert_eq!(
        attributes(&mut client, &d).await.unwrap_err(),
        nfsstat3::NFS3ERR_STALE
    );
}

#[tokio::test]
async fn hard_links_and_special_files() {
    let Some(lab) = lab().await else { return };
    let (mut client, root) = lab.client().await;
    let f = file(&mut client, &root, b"f").await;
    let link = |name| LINK3args {
        file: f.clone(),
        link: at(&root, name),
    };
    outcome(client.link(&link(b"second")).await.unwrap()).unwrap();
    assert_eq!(lookup(&mut client, &root, b"second").await.as_ref(), Ok(&f));
    assert_eq!(attributes(&mut client, &f).await.unwrap().nlink, 2);
    let again = outcome(client.link(&link(b"second")).await.unwrap()).unwrap_err();
    assert_eq!(again, nfsstat3::NFS3ERR_EXIST);
    let device = nfs3_types::nfs3::devicedata3 {
        dev_attributes: mode(0o640),
        spec: specdata3 {
            specdata1: 1,
            specdata2: 3,
        },
    };
    for (name, what, kind) in [
        (
            &b"pipe"[..],
            mknoddata3::NF3FIFO(mode(0o640)),
            ftype3::NF3FIFO,
        ),
        (b"socket", mknoddata3::NF3SOCK(mode(0o640)), ftype3::NF3SOCK),
        (b"null", mknoddata3::NF3CHR(device), ftype3::NF3CHR),
    ] {
        let args = MKNOD3args {
            where_: at(&root, name),
            what,
        };
        let node = outcome(client.mknod(&args).await.unwrap())
            .unwrap()
            .obj
            .unwrap();
        let made = attributes(&mut client, &node).await.unwrap();
        assert_eq!((made.type_, made.mode), (kind, 0o640));
        // Reading one would reach a device, or wait for ever.
        assert_eq!(
            read(&mut client, &node, 0, 1).await,
            Err(nfsstat3::NFS3ERR_INVAL)
        );
    }
}

#[tokio::test]
async fn names_are_bytes_up_to_255() {
    let Some(lab) = lab().await else { return };
    let (mut client, root) = lab.client().await;
    let odd = [0xff, 0xfe, b'\n', b'"', b'\\', 0x80];
    let made = file(&mut client, &root, &odd).await;
    assert_eq!(lookup(&mut client, &root, &odd).await, Ok(made));
    file(&mut client, &root, &[b'n'; 255]).await;
    let long = create(
        &mut client,
        &root,
        &[b'n'; 256],
        createhow3::GUARDED(mode(0o600)),
    )
    .await;
    assert_eq!(long, Err(nfsstat3::NFS3ERR_NAMETOOLONG));
    let args = PATHCONF3args {
        object: root.clone(),
    };
    assert_eq!(
        outcome(client.pathconf(&args).await.unwrap())
            .unwrap()
            .name_max,
        255
    );
}

#[tokio::test]
async fn a_large_directory_is_listed_whole_while_it_changes() {
    const ENTRIES: usize = 5_000;
    let Some(lab) = lab().await else { return };
    let big = lab.dir.path().join("big");
    std::fs::create_dir(&big).unwrap();
    let stays: BTreeSet<String> = (0..ENTRIES).map(|i| format!("entry-{i:05}")).collect();
    for name in &stays {
        std::fs::write(big.join(name), name).unwrap();
        std::fs::write(big.join(format!("gone-{name}")), "").unwrap();
    }
    let (mut client, root) = lab.client().await;
    let dir = lookup(&mut client, &root, b"big").await.unwrap();
    let (mut seen, mut cookie, mut pages) = (BTreeSet::new(), 0, 0);
    loop {
        let args = READDIRPLUS3args {
            dir: dir.clone(),
            cookie,
            cookieverf: cookieverf3::default(),
            dircount: 8192,
            maxcount: 32768,
        };
        let page = outcome(client.readdirplus(&args).await.unwrap())
            .unwrap()
            .reply;
        for entry in &page.entries.0 {
            let name = String::from_utf8(entry.name.0.to_vec()).unwrap();
            if name.starts_with("entry-") {
                let Nfs3Option::Some(attributes) = &entry.name_attributes else {
                    panic!("{name} has no attributes");
                };
                assert_eq!(attributes.fileid, entry.fileid);
                assert!(entry.name_handle.is_some());
                assert!(seen.insert(name), "listed twice");
            }
            cookie = entry.cookie;
        }
        if page.eof {
            break;
        }
        // Between two pages others remove and add entries.
        for name in stays.iter().skip(pages * 100).take(100) {
            std::fs::remove_file(big.join(format!("gone-{name}"))).ok();
            std::fs::write(big.join(format!("new-{name}")), "").unwrap();
        }
        pages += 1;
    }
    assert!(pages > 10);
    assert_eq!(seen, stays);

    let mut bare = READDIR3args {
        dir,
        cookie: 0,
        cookieverf: cookieverf3::default(),
        count: 40,
    };
    let small = outcome(client.readdir(&bare).await.unwrap()).unwrap_err();
    assert_eq!(small, nfsstat3::NFS3ERR_TOOSMALL);
    bare.count = 1024;
    let page = outcome(client.readdir(&bare).await.unwrap()).unwrap();
    assert!(page.reply.entries.0.len() > 5 && !page.reply.eof);
}

#[tokio::test]
async fn space_is_that_of_the_file_system() {
    let Some(lab) = lab().await else { return };
    let (mut client, root) = lab.client().await;
    let args = FSSTAT3args { fsroot: root };
    let space = outcome(client.fsstat(&args).await.unwrap()).unwrap();
    let local = rustix::fs::statvfs(lab.dir.path()).unwrap();
    assert_eq!(space.tbytes, local.f_blocks * local.f_frsize);
    assert_eq!(space.tfiles, local.f_files);
}

#[tokio::test]
async fn a_client_without_a_privileged_port_is_refused() {
    let Some(lab) = lab().await else { return };
    let strict = start(lab.dir.path(), lab.state.path(), true).await;
    let mount = |privileged| {
        Nfs3ConnectionBuilder::new(
            TokioConnector,
            "127.0.0.1",
            lab.dir.path().to_str().unwrap(),
        )
        .mount_port(strict.addr.port())
        .nfs3_port(strict.addr.port())
        .connect_from_privileged_port(privileged)
        .mount()
    };
    let stream = TcpStream::connect(strict.addr).await.unwrap();
    let mut portmap = nfs3_client::PortmapperClient::new(TokioIo::new(stream));
    let port = portmap.getport(100_003, 3, 6).await.unwrap();
    assert_eq!(
        port,
        strict.addr.port(),
        "the port may be asked for by anybody"
    );
    let refused = mount(false).await.err().unwrap().to_string();
    assert!(refused.contains("TOOWEAK"), "{refused}");
    assert!(mount(true).await.is_ok());
    strict.shutdown().await;
}

#[tokio::test]
async fn garbage_is_answered_or_the_connection_closed_and_others_are_served() {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    let Some(lab) = lab().await else { return };
    // A record of 2 GiB is not waited for, nor is memory taken for it.
    let mut stream = TcpStream::connect(lab.server.addr).await.unwrap();
    stream
        .write_all(&[0xff, 0xff, 0xff, 0xff, 1, 2, 3])
        .await
        .unwrap();
    assert_eq!(stream.read(&mut [0; 16]).await.unwrap_or(0), 0);
    // A call of an unknown program, in fragments of one byte.
    let mut call = vec![0, 0, 0, 7, 0, 0, 0, 0, 0, 0, 0, 2, 0, 1, 2, 3, 0, 0, 0, 3];
    call.extend([0; 20]);
    let mut stream = TcpStream::connect(lab.server.addr).await.unwrap();
    for (i, byte) in call.iter().enumerate() {
        let last = if i + 1 == call.len() { 0x80 } else { 0 };
        stream.write_all(&[last, 0, 0, 1, *byte]).await.unwrap();
    }
    let mut reply = [0; 28];
    stream.read_exact(&mut reply).await.unwrap();
    assert_eq!(reply[..8], [0x80, 0, 0, 24, 0, 0, 0, 7]);
    assert_eq!(reply[24..], [0, 0, 0, 1], "PROG_UNAVAIL");
    let (mut client, root) = lab.client().await;
    assert!(attributes(&mut client, &root).await.is_ok());
}

#[tokio::test]
async fn local_files_and_served_files_are_the_same_files() {
    let Some(lab) = lab().await else { return };
    let (mut client, root) = lab.client().await;
    let path = lab.dir.path().join("local");
    std::fs::write(&path, "hello").unwrap();
    let found = lookup(&mut client, &root, b"local").await.unwrap();
    assert_eq!(
        read(&mut client, &found, 1, 3).await.unwrap(),
        (b"ell".to_vec(), false)
    );
    let (remote, local) = (
        attributes(&mut client, &found).await.unwrap(),
        path.metadata().unwrap(),
    );
    assert_eq!(remote.fileid, local.ino());
    assert_eq!(i64::from(remote.mtime.seconds), local.mtime());
    assert_eq!(i64::from(remote.mtime.nseconds), local.mtime_nsec());
}

#[tokio::test]
async fn a_call_sent_again_on_a_new_connection_gets_its_first_answer() {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    let Some(lab) = lab().await else { return };
    let (_, root) = lab.client().await;
    // MKDIR of "once" by root, as bytes.
    let mut call: Vec<u8> = [77_u32, 0, 2, 100_003, 3, 9, 1, 20, 0, 0, 0, 0, 0, 0, 0]
        .iter()
        .flat_map(|word| word.to_be_bytes())
        .collect();
    let opaque = |out: &mut Vec<u8>, bytes: &[u8]| {
        out.extend(u32::try_from(bytes.len()).unwrap().to_be_bytes());
        out.extend(bytes);
        out.resize(out.len().next_multiple_of(4), 0);
    };
    opaque(&mut call, &root.data);
    opaque(&mut call, b"once");
    call.extend([0; 24]);
    let mark = 0x8000_0000 | u32::try_from(call.len()).unwrap();
    let mut answers = Vec::new();
    for _ in 0..2 {
        let mut stream = TcpStream::connect(lab.server.addr).await.unwrap();
        stream.write_all(&mark.to_be_bytes()).await.unwrap();
        stream.write_all(&call).await.unwrap();
        let len = stream.read_u32().await.unwrap() & 0x7fff_ffff;
        let mut answer = vec![0; len as usize];
        stream.read_exact(&mut answer).await.unwrap();
        assert_eq!(answer[24..28], [0; 4], "NFS3_OK");
        answers.push(answer);
        // Even when it is gone meanwhile: the answer is to the first call.
        std::fs::remove_dir(lab.dir.path().join("once")).ok();
    }
    assert_eq!(answers[0], answers[1]);
    assert!(!lab.dir.path().join("once").exists());
}
