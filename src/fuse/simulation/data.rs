//! A program's data: reads and writes through the page cache and past it.

use std::ops::Range;

use bytes::Bytes;

use crate::fuse::error::Result;
use crate::fuse::write::{Quick, WriteTo};

use super::Seen;
use super::kernel::{Generation, PAGE, Page};
use super::model::{WORD, bytes};
use super::process::{Descriptor, Process};
use super::server::words;

fn pages(from: u64, to: u64) -> Range<u64> {
    from / PAGE..to.div_ceil(PAGE)
}

fn range(from: u64, to: u64) -> Range<usize> {
    usize::try_from(from).unwrap()..usize::try_from(to).unwrap()
}

impl Process {
    /// Reads words, and checks them.
    pub(super) async fn read(&self, descriptor: &Descriptor, from: u64, count: u64) -> Result<()> {
        let (offset, length) = (from * WORD, count * WORD);
        let direct = descriptor.opened.direct || descriptor.has(libc::O_DIRECT);
        let view = self.view(descriptor.begun);
        let (data, knows_end) = if direct {
            (self.ask(descriptor, offset, length).await?.to_vec(), true)
        } else {
            self.read_cached(descriptor, offset, offset + length)
                .await?
        };
        let (file, host) = (descriptor.node.ino, self.host.number);
        let mut seen: Vec<u64> = words(&data).collect();
        let unsure = !direct && descriptor.node.is_unsure();
        while unsure && seen.last() == Some(&0) {
            seen.pop();
        }
        let world = &self.host.world;
        world.note(|| format!("host {host} reads file {file} words {from}+{count}: {seen:?}"));
        world.model.seen(file, from, &seen);
        let end = (data.len() as u64) < length && knows_end && !unsure;
        let checked = world.model.check(file, view, from, &seen, end);
        let direct = if direct {
            "directly"
        } else {
            "by the page cache"
        };
        world.demand(checked, || {
            format!("host {host} reads file {file} {direct}")
        });
        Ok(())
    }

    async fn ask(&self, descriptor: &Descriptor, offset: u64, length: u64) -> Result<Bytes> {
        let length = u32::try_from(length).unwrap();
        self.request(self.host.fs.read(&descriptor.file, offset, length))
            .await
    }

    /// Also says whether the kernel knew the file's end: it does not when it asked for it and a
    /// write of this host overtook the answer.
    async fn read_cached(
        &self,
        descriptor: &Descriptor,
        from: u64,
        to: u64,
    ) -> Result<(Vec<u8>, bool)> {
        let node = &descriptor.node;
        let knows_end = if to > node.size() && !node.is_valid() {
            self.refresh(node).await?.1
        } else {
            true
        };
        let mut data = Vec::new();
        loop {
            let at = from + data.len() as u64;
            if at >= to.min(node.size()) {
                return Ok((data, knows_end));
            }
            let Some(page) = node.page(at / PAGE) else {
                self.fill(descriptor, at, to.min(node.size())).await?;
                continue;
            };
            self.host.world.saw(Seen::PageUsed);
            let end = to.min(node.size()).min((at / PAGE + 1) * PAGE);
            let start = usize::try_from(at % PAGE).unwrap();
            let length = usize::try_from(end.saturating_sub(at)).unwrap();
            data.extend_from_slice(&page[start..start + length]);
        }
    }

    /// Reads pages that are not up to date.
    async fn fill(&self, descriptor: &Descriptor, from: u64, to: u64) -> Result<()> {
        let node = &descriptor.node;
        let mut all = pages(from, to);
        all.end = (all.start..all.end)
            .find(|index| node.page(*index).is_some())
            .unwrap_or(all.end)
            .max(all.start + 1);
        let _locked = node.lock_pages(all.clone()).await;
        if all.clone().any(|index| node.page(index).is_some()) {
            return Ok(());
        }
        let (version, epoch) = (self.host.version(), node.epoch());
        let (start, length) = (all.start * PAGE, (all.end - all.start) * PAGE);
        let data = self.ask(descriptor, start, length).await?;
        if (data.len() as u64) < length {
            self.host
                .short_read(node, start + data.len() as u64, version);
        }
        if node.epoch() != epoch {
            return Ok(());
        }
        let mut rest = &data[..];
        for index in all {
            let mut page: Page = [0; 64];
            let count = rest.len().min(page.len());
            page[..count].copy_from_slice(&rest[..count]);
            rest = &rest[count..];
            node.set_page(index, Some(page));
        }
        Ok(())
    }

    /// Writes words at a place, or at the end.
    pub(super) async fn write(&self, descriptor: &Descriptor, from: u64, count: u64) -> Result<()> {
        let (node, host) = (&descriptor.node, self.host.number);
        let (file, world) = (node.ino, &self.host.world);
        let _lock = node.lock.lock().await;
        let appends = descriptor.has(libc::O_APPEND);
        let number = if appends {
            world.model.append(file, host, count)
        } else {
            world.model.write(file, host, from, from + count)
        };
        world.note(|| format!("host {host} writes {number} to file {file} words {from}+{count}"));
        let data = bytes(number, count);
        let offset = if appends { node.size() } else { from * WORD };
        let written = self.write_bytes(descriptor, offset, &data).await;
        self.hears(descriptor, &written);
        let durable = descriptor.has(libc::O_DSYNC)
            || descriptor.has(libc::O_DIRECT)
            || self.host.fs.options.sync;
        world.model.over(file, number, written.is_ok(), durable);
        if durable && written.is_ok() {
            world.saw(Seen::DurableWrite);
        }
        written
    }

    async fn write_bytes(&self, descriptor: &Descriptor, offset: u64, data: &[u8]) -> Result<()> {
        let node = &descriptor.node;
        let end = offset + data.len() as u64;
        if descriptor.opened.direct || descriptor.has(libc::O_DIRECT) {
            let drops = |since| {
                descriptor.has(libc::O_DIRECT) && !descriptor.opened.direct
                    || self.host.generation >= since
            };
            if drops(Generation::Middle) {
                node.drop_pages(pages(offset, end)).await;
            }
            self.submit(descriptor, offset, data).await?;
            self.host.wrote(node, end);
            if drops(Generation::New) {
                node.drop_pages(pages(offset, end)).await;
            }
            return Ok(());
        }
        let mut at = offset;
        while at < end {
            at = self.write_pages(descriptor, (offset, at), data).await?;
        }
        if descriptor.has(libc::O_DSYNC) {
            // generic_write_sync, under the same lock.
            self.request(self.host.fs.fsync(descriptor.opened.fh))
                .await?;
        }
        Ok(())
    }

    /// One request of a write through the page cache: up to a page that is written in part and
    /// not up to date, which stays locked. Returns where the next one begins.
    async fn write_pages(
        &self,
        descriptor: &Descriptor,
        (offset, at): (u64, u64),
        data: &[u8],
    ) -> Result<u64> {
        let node = &descriptor.node;
        let mut end = at;
        let mut last = None;
        while last.is_none() && end < offset + data.len() as u64 {
            let index = end / PAGE;
            let to = (offset + data.len() as u64).min((index + 1) * PAGE);
            let lock = node.lock_pages(index..index + 1).await;
            let part = &data[range(end - offset, to - offset)];
            let whole = to - end == PAGE;
            if let Some(mut page) = node.page(index).or_else(|| whole.then_some([0; 64])) {
                page[range(end % PAGE, end % PAGE + to - end)].copy_from_slice(part);
                node.set_page(index, Some(page));
            } else {
                last = Some(lock);
            }
            end = to;
        }
        let part = &data[range(at - offset, end - offset)];
        let sent = self.submit(descriptor, at, part).await;
        if sent.is_ok() {
            self.host.wrote(node, end);
        } else {
            for index in pages(at, end) {
                node.set_page(index, None);
            }
        }
        drop(last);
        sent.map(|()| end)
    }

    /// A WRITE request.
    async fn submit(&self, descriptor: &Descriptor, offset: u64, data: &[u8]) -> Result<()> {
        let (fs, file) = (&self.host.fs, &descriptor.file);
        let to = WriteTo {
            offset,
            flags: descriptor.flags,
            from_pages: false,
        };
        let end = file.inode.state().attr().size;
        match fs.write_quick(file, to, data) {
            Quick::Done => {
                if descriptor.has(libc::O_APPEND) {
                    let taken: Vec<u64> = words(data).collect();
                    let model = &self.host.world.model;
                    model.seen(descriptor.node.ino, end / WORD, &taken);
                }
                self.host.world.check_held(&self.host);
                Ok(())
            }
            Quick::Failed(errno) => Err(errno),
            Quick::Wait => {
                self.host.world.saw(Seen::WriterWaited);
                self.request(fs.write(file, to, data)).await
            }
        }
    }
}
