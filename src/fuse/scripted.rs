//! For tests: the file system over a server in memory whose answers the test writes itself.

use std::io;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex};

use nfs3_types::nfs3::{NFS_PROGRAM as Proc, fattr3, ftype3, nfsstat3, nfstime3, specdata3};
use nfs3_types::rpc::opaque_auth;
use nfs3_types::xdr_codec::{Pack, Unpack};
use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream, ReadHalf, WriteHalf};
use tokio::sync::oneshot;

use nfs::rpc::Settings;
use nfs::rpc::connector::Connector;
use nfs::rpc::nfs3::{FileHandle, Nfs3};

use super::fs::{Fs, Kernel};
use super::hidden::Hidden;
use super::inode::ROOT;
use super::known::Forgetting;
use super::options::FuseOptions;

/// What answers calls.
pub(super) trait Answers: Send + std::fmt::Debug + 'static {
    /// Reads the arguments and writes the results, from the status on.
    fn answer(&mut self, procedure: Proc, input: &[u8], out: &mut Vec<u8>);
}

/// Connects to the server.
#[derive(Debug)]
struct Wire<A>(Arc<Mutex<A>>);

impl<A: Answers> Connector for Wire<A> {
    type Reader = ReadHalf<DuplexStream>;
    type Writer = WriteHalf<DuplexStream>;

    async fn connect(&self, _: SocketAddr, _: usize) -> io::Result<(Self::Reader, Self::Writer)> {
        let (ours, mut theirs) = tokio::io::duplex(1 << 20);
        let server = Arc::clone(&self.0);
        tokio::spawn(async move {
            // Until the client closes.
            while let Ok(mark) = theirs.read_u32().await {
                let mut call = vec![0; (mark & 0x7fff_ffff) as usize];
                theirs.read_exact(&mut call).await.unwrap();
                let mut input = call.as_slice();
                let header: [u32; 6] = std::array::from_fn(|_| u32::unpack(&mut input).unwrap().0);
                for _ in ["credential", "verifier"] {
                    opaque_auth::unpack(&mut input).unwrap();
                }
                let mut reply = Vec::new();
                for word in [header[0], 1, 0, 0, 0, 0] {
                    reply.pack_all(&word);
                }
                let procedure = Proc::try_from(header[5]).unwrap();
                server.lock().unwrap().answer(procedure, input, &mut reply);
                let length = u32::try_from(reply.len()).unwrap() | 0x8000_0000;
                theirs.write_u32(length).await.unwrap();
                theirs.write_all(&reply).await.unwrap();
            }
        });
        Ok(tokio::io::split(ours))
    }
}

#[derive(Debug)]
struct NoCaches;

impl Kernel for NoCaches {
    fn drop_attributes(&self, _: u64) {}
    fn drop_pages(&self, _: u64) {}
    fn drop_range(&self, _: u64, _: u64, _: u64, _: oneshot::Sender<()>) {}
    fn forget_unused(&self, _: Forgetting) {}
}

/// A file system, and its server.
pub(super) struct World<A> {
    pub(super) fs: Arc<Fs>,
    pub(super) server: Arc<Mutex<A>>,
    _run_dir: tempfile::TempDir,
}

impl<A: Answers> World<A> {
    pub(super) async fn new(server: A) -> Self {
        let server = Arc::new(Mutex::new(server));
        let settings = Settings::new(([192, 0, 2, 1], 2049).into());
        let nfs = Nfs3::over(&settings, Wire(Arc::clone(&server))).unwrap();
        let root = FileHandle::new(&ROOT.to_be_bytes()).unwrap();
        let run_dir = tempfile::tempdir().unwrap();
        let hidden = Hidden::new(run_dir.path(), "scripted");
        let options = FuseOptions::default();
        let fs = Fs::start(nfs, root, options, Arc::new(NoCaches), hidden);
        Self {
            fs: fs.await.unwrap(),
            server,
            _run_dir: run_dir,
        }
    }
}

pub(super) trait PackAll {
    fn pack_all(&mut self, value: &impl Pack);
}

impl PackAll for Vec<u8> {
    fn pack_all(&mut self, value: &impl Pack) {
        value.pack(self).unwrap();
    }
}

pub(super) fn ok(out: &mut Vec<u8>) -> &mut Vec<u8> {
    out.pack_all(&nfsstat3::NFS3_OK);
    out
}

pub(super) fn refuse(out: &mut Vec<u8>, status: nfsstat3) {
    out.pack_all(&status);
    out.pack_all(&false);
}

pub(super) fn attributes(fileid: u64, type_: ftype3) -> fattr3 {
    fattr3 {
        type_,
        mode: 0o755,
        nlink: 1,
        uid: 0,
        gid: 0,
        size: 0,
        used: 0,
        rdev: specdata3::default(),
        fsid: 1,
        fileid,
        atime: nfstime3::default(),
        mtime: nfstime3::default(),
        ctime: nfstime3::default(),
    }
}
