//! What is fuzzed: all that reads bytes from a server. Each target takes any input, and panics if
//! the code under test does or if a promise of its is broken. `tests/fuzz.rs` runs the same.

use std::net::SocketAddr;
use std::sync::Mutex;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use nfs::rpc::connector::Connector;
use nfs::rpc::nfs3::{FileHandle, Nfs3, Stable, decode};
use nfs::rpc::record::RecordDecoder;
use nfs::rpc::xdr::Decoder;
use nfs::rpc::{Cred, Settings, message, mountd};
use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream, ReadHalf, WriteHalf, duplex, split};

/// The most that a record may have in [`records`].
const LIMIT: usize = 100;

/// A stream gives the same records however it is cut into reads, none above the limit.
/// Input: the length of a read, then the stream.
pub(crate) fn records(input: &[u8]) {
    let Some((step, stream)) = input.split_first() else {
        return;
    };
    let all = cut(stream, stream.len().max(1));
    assert!(all.0.iter().all(|record| record.len() <= LIMIT));
    assert_eq!(all, cut(stream, usize::from(*step) + 1));
}

/// The records of a stream, and whether it broke the framing.
fn cut(stream: &[u8], step: usize) -> (Vec<Bytes>, bool) {
    let mut decoder = RecordDecoder::new(LIMIT);
    let mut buffer = BytesMut::new();
    let mut records = Vec::new();
    for read in stream.chunks(step) {
        buffer.extend_from_slice(read);
        loop {
            match decoder.next(&mut buffer) {
                Ok(Some(record)) => records.push(record),
                Ok(None) => break,
                Err(_) => return (records, true),
            }
        }
    }
    (records, false)
}

/// A reply is read or refused, by whichever procedure it is taken for. Input: the procedure, how
/// much was asked for, then the record.
pub(crate) fn replies(input: &[u8]) {
    let [procedure, asked, record @ ..] = input else {
        return;
    };
    let record = Bytes::copy_from_slice(record);
    let length = record.len();
    let _ = message::reply_xid(&record);
    if let Ok(Ok(mut results)) = message::reply_results(record) {
        let asked = u32::from(*asked) * 16;
        results_of(*procedure, asked, length, &mut results);
    }
}

fn results_of(procedure: u8, asked: u32, length: usize, results: &mut Decoder) {
    match procedure % 16 {
        0 => drop(decode::getattr(results)),
        1 => drop(decode::wcc(results)),
        2 => drop(decode::lookup(results)),
        3 => drop(decode::access(results)),
        4 => drop(decode::readlink(results)),
        5 => {
            if let Ok(read) = decode::read(results, asked) {
                assert!(read.data.len() <= asked as usize);
                assert!(!read.data.is_empty() || read.eof || asked == 0);
            }
        }
        6 => {
            if let Ok(written) = decode::write(results, asked) {
                assert!(written.count <= asked);
                assert!(written.count > 0 || asked == 0);
            }
        }
        7 => drop(decode::create(results)),
        8 => drop(decode::rename(results)),
        9 => drop(decode::link(results)),
        // Any name is decoded: whoever lists leaves out what Linux cannot have.
        10 => {
            if let Ok(page) = decode::readdir(results) {
                assert!(page.entries.len() * 24 <= length);
            }
        }
        11 => {
            if let Ok(page) = decode::readdirplus(results) {
                assert!(page.entries.len() * 32 <= length);
            }
        }
        12 => drop(decode::fsstat(results)),
        13 => drop(decode::fsinfo(results)),
        14 => drop(decode::commit(results)),
        _ => {
            drop(decode::pathconf(&mut results.clone()));
            drop(mountd::mounted(results));
        }
    }
}

/// A client whose server answers with the input ends every call by its deadline.
pub(crate) fn sessions(input: &[u8]) {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_time()
        .start_paused(true)
        .build()
        .expect("a runtime without I/O needs nothing of the system");
    runtime.block_on(session(input));
}

const DEADLINE: Duration = Duration::from_secs(40);

async fn session(input: &[u8]) {
    let mut settings = Settings::new(SocketAddr::from(([192, 0, 2, 1], 2049)));
    settings.io_timeout = Some(DEADLINE);
    let server = Hostile(Mutex::new(input.to_vec()));
    let nfs = Nfs3::over(&settings, server).expect("the settings are in range");
    let (cred, file) = (Cred::root(), FileHandle::new(b"file").expect("it is short"));
    let calls = async {
        tokio::join!(
            nfs.getattr(&cred, &file),
            nfs.read(&cred, &file, 0, 64),
            nfs.write(
                &cred,
                &file,
                0,
                Bytes::from_static(b"data!"),
                Stable::Unstable
            ),
            nfs.readdirplus(&cred, &file, 0, [0; 8], 512, 512),
            nfs.rename(&cred, (&file, b"a"), (&file, b"b"), Some(&file)),
        )
    };
    // RENAME may look something up after its own call.
    let ended = tokio::time::timeout(2 * DEADLINE + Duration::from_secs(1), calls).await;
    assert!(ended.is_ok(), "a call has outlived its deadline");
}

/// Answers each connection with the next part of the input, xids of the client's calls put in
/// where the input has a multiple of four bytes that says so (0xfe, number of the call, 0, 0).
struct Hostile(Mutex<Vec<u8>>);

impl Connector for Hostile {
    type Reader = ReadHalf<DuplexStream>;
    type Writer = WriteHalf<DuplexStream>;

    async fn connect(
        &self,
        _: SocketAddr,
        _: usize,
    ) -> std::io::Result<(Self::Reader, Self::Writer)> {
        let (client, mut server) = duplex(4096);
        let mut input = self.0.lock().unwrap_or_else(|e| e.into_inner());
        let half = input.len().div_ceil(2);
        let mut answer: Vec<u8> = input.drain(..half).collect();
        tokio::spawn(async move {
            let mut xids = Vec::new();
            let mut call = vec![0; 4096];
            // What comes within a moment is enough to know some xids.
            let moment = Duration::from_millis(1);
            while let Ok(Ok(read @ 1..)) =
                tokio::time::timeout(moment, server.read(&mut call)).await
            {
                let mut calls = &call[..read];
                while let Some((mark, rest)) = calls.split_first_chunk::<4>() {
                    let length = (u32::from_be_bytes(*mark) & 0x7fff_ffff) as usize;
                    xids.extend(rest.first_chunk::<4>().copied());
                    calls = rest.get(length..).unwrap_or(&[]);
                }
            }
            for word in answer.chunks_exact_mut(4) {
                if let [0xfe, number, 0, 0] = word
                    && let Some(xid) = xids.get(usize::from(*number))
                {
                    word.copy_from_slice(xid);
                }
            }
            let _ = server.write_all(&answer).await;
            // An input that begins with an even byte leaves the connection open and silent.
            if answer.first().is_some_and(|first| first % 2 == 0) {
                tokio::time::sleep(2 * DEADLINE).await;
            }
        });
        Ok(split(client))
    }
}
