//! Reading: READ calls in parallel, with what is held of the file laid over the answers.
//!
//! Invariant: a read shows every byte that was written on this host before it began, wherever
//! that byte is at the time, and ends early only at the end of the file.

use std::sync::Arc;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use tokio::task::JoinSet;

use nfs::rpc::nfs3::ReadOk;

use super::attr::now;
use super::error::{Errno, Result};
use super::extents::ReadToken;
use super::fs::{Fs, OpenFile};
use super::inode::Inode;

/// How often a file that is open is looked at, at most.
const WATCH_AT_LEAST: Duration = Duration::from_secs(1);

/// Keeps what is held while a READ is under way.
struct Reading<'a> {
    inode: &'a Inode,
    token: ReadToken,
}

impl Drop for Reading<'_> {
    fn drop(&mut self) {
        if let Some(data) = self.inode.state().data.as_mut() {
            data.held.end_read(self.token);
        }
    }
}

/// The kernel may have pages of the file once this is over.
pub(super) struct Pages<'a>(pub(super) &'a Inode);

impl Drop for Pages<'_> {
    fn drop(&mut self) {
        self.0.state().may_have_pages = true;
    }
}

impl Fs {
    pub(super) async fn read(
        self: &Arc<Self>,
        file: &Arc<OpenFile>,
        offset: u64,
        size: u32,
    ) -> Result<Bytes> {
        let inode = &file.inode;
        let mut reading = None;
        self.watch(file);
        let _pages = Pages(inode);
        {
            let mut state = inode.state();
            state.may_have_pages = true;
            let known = state.attr().size;
            if let Some(data) = state.data.as_mut()
                && !data.held.is_empty()
            {
                let end = (offset + u64::from(size)).min(known);
                if offset >= end {
                    return Ok(Bytes::new());
                }
                if data.held.covers(offset, end) {
                    let length = usize::try_from(end - offset).map_err(|_| Errno(libc::EINVAL))?;
                    let mut bytes = BytesMut::zeroed(length);
                    data.held.overlay(offset, &mut bytes, None);
                    return Ok(bytes.freeze());
                }
                let token = data.held.begin_read();
                reading = Some(Reading { inode, token });
            }
        }
        let from_server = self.read_server(file, offset, size).await?;
        let Some(reading) = reading else {
            return Ok(from_server);
        };
        let state = inode.state();
        let mut bytes = from_server;
        if let Some(data) = &state.data
            && let Some(held_end) = data.held.end(Some(reading.token))
        {
            // Beyond the server's end there may be bytes that it does not have yet, behind a hole.
            let end = held_end.min(offset + u64::from(size));
            let length = usize::try_from(end.saturating_sub(offset)).unwrap_or(0);
            if length > bytes.len() || data.held.touches(offset, offset + bytes.len() as u64) {
                let mut whole = BytesMut::with_capacity(length.max(bytes.len()));
                whole.extend_from_slice(&bytes);
                whole.resize(length.max(bytes.len()), 0);
                data.held.overlay(offset, &mut whole, Some(reading.token));
                bytes = whole.freeze();
            }
        }
        drop(state);
        drop(reading);
        Ok(bytes)
    }

    /// Looks after a file as long as it is open: its pages are in the kernel's cache, which does
    /// not ask whether another host changed the file.
    fn watch(self: &Arc<Self>, file: &OpenFile) {
        {
            let mut state = file.inode.state();
            if std::mem::replace(&mut state.watched, true) {
                return;
            }
        }
        let (fs, inode, cred) = (Arc::clone(self), Arc::clone(&file.inode), file.cred.clone());
        self.runtime.spawn(async move {
            loop {
                let trusted = inode.state().cached.remaining(now());
                tokio::time::sleep(trusted.max(WATCH_AT_LEAST)).await;
                {
                    let mut state = inode.state();
                    if state.opens == 0 {
                        state.watched = false;
                        return;
                    }
                }
                // It takes in what it hears, and that drops pages if need be. A server that is
                // away is asked again.
                let _ = fs.fresh(&cred, &inode).await;
            }
        });
    }

    async fn read_server(
        self: &Arc<Self>,
        file: &Arc<OpenFile>,
        offset: u64,
        size: u32,
    ) -> Result<Bytes> {
        let one = self.sizes.read;
        if size <= one {
            return self.read_range(file, offset, size).await;
        }
        // Dropped with this future, which ends the calls.
        let mut calls = JoinSet::new();
        for (index, at) in (0..size).step_by(one as usize).enumerate() {
            let (fs, file) = (Arc::clone(self), Arc::clone(file));
            let count = one.min(size - at);
            calls.spawn(async move {
                let part = fs.read_range(&file, offset + u64::from(at), count).await;
                (index, count, part)
            });
        }
        let mut parts = calls.join_all().await;
        parts.sort_unstable_by_key(|part| part.0);
        let mut whole = BytesMut::with_capacity(size as usize);
        for (_, count, part) in parts {
            let part = part?;
            whole.extend_from_slice(&part);
            if (part.len() as u64) < u64::from(count) {
                break;
            }
        }
        Ok(whole.freeze())
    }

    /// Reads a range of at most one call's size; goes on after short answers.
    async fn read_range(&self, file: &OpenFile, offset: u64, size: u32) -> Result<Bytes> {
        let first = self.read_once(file, offset, size).await?;
        if first.eof || first.data.len() as u64 >= u64::from(size) {
            return Ok(first.data);
        }
        let mut whole = BytesMut::with_capacity(size as usize);
        whole.extend_from_slice(&first.data);
        //= 1813-3.3.6-short: “If the server returns less than the count requested and eof set to
        //= FALSE, the client should issue another READ to get the remaining data.”
        while (whole.len() as u64) < u64::from(size) {
            // Less than `size`, which is a u32.
            let done = u32::try_from(whole.len()).map_err(|_| Errno(libc::EIO))?;
            let next = self
                .read_once(file, offset + u64::from(done), size - done)
                .await?;
            whole.extend_from_slice(&next.data);
            if next.eof || next.data.is_empty() {
                break;
            }
        }
        Ok(whole.freeze())
    }

    async fn read_once(&self, file: &OpenFile, offset: u64, size: u32) -> Result<ReadOk> {
        let asked = self.tick();
        let answer = self
            .nfs
            .read(&file.cred, &file.inode.handle, offset, size)
            .await?;
        if let Some(attr) = answer.attr {
            self.absorb(&file.inode, attr, asked);
        }
        Ok(answer)
    }
}
