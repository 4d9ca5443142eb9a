//! The cache and the sequences: admission, sharing, and what a broken page does.
//!
//! # A broken page
//! The tables of the batch are checked before each step, and the whole pool now and then; an audit
//! finds what no table of the batch shows. A page that breaks an invariant is put in quarantine and
//! counted. The sequence whose entry is stale, or else the one that took the page last, fails by name.
//! The others that hold the page lose their tables and are computed anew from their tokens: rows of
//! theirs that are in flight are nobody's, so that no token comes from that page any more, and those that
//! were delivered stay as they are. Where no page can be named, the books start anew and everybody is
//! computed anew.

use std::sync::Arc;

use exrail_kernels::{Backend, PAGE_TOKENS, PageId};

use super::Worker;
use crate::cache::{Admitted, DevicePages, Namespace, PageFault, Pins, TableView, Wanted};
use crate::counters::Total;
use crate::event::SequenceFault;
use crate::faults::Guard;
use crate::handle::EngineOptions;
use crate::load::Loaded;
use crate::places::Left;
use crate::sequence::{Ending, Running, Traffic, Waiting};

/// The pool as the cache moves its pages: in the order of the device's other work, and there when it returns.
pub(super) struct PoolPages<'a, B: Backend> {
    pub(super) backend: &'a B,
    pub(super) pool: &'a mut B::KvPool,
}

impl<B: Backend> DevicePages for PoolPages<'_, B> {
    fn page_bytes(&self) -> usize {
        self.backend.kv_page_bytes(self.pool)
    }

    fn read(&mut self, page: PageId, bytes: &mut [u8]) {
        self.backend.kv_read_page(self.pool, page, bytes);
    }

    fn write(&mut self, page: PageId, bytes: &[u8]) {
        self.backend.kv_write_page(self.pool, page, bytes);
    }
}

/// What came of the head of a queue.
enum Head {
    /// It left the queue.
    Left,
    /// It waits for pages.
    Stays,
}

impl<B: Backend> Worker<B> {
    /// The next of the queue waits for its pages and nobody passes it. Those that were admitted before come
    /// first.
    pub(super) fn admit(&mut self) {
        self.name_the_model();
        while self.running.len() < self.options.max_sequences {
            let head = match self.suspended.is_empty() {
                false => self.resume_head(),
                true => self.admit_head(),
            };
            match head {
                Head::Left => {}
                Head::Stays => return,
            }
        }
    }

    /// Once the hash of the model's files is known, it pins what is computed from then on.
    pub(super) fn name_the_model(&mut self) {
        if self.pins.model_sha256.is_some() {
            return;
        }
        if let Some(sha256) = self.loaded.model_sha256.get() {
            Arc::make_mut(&mut self.pins).model_sha256 = Some(sha256.to_owned());
        }
    }

    fn admit_head(&mut self) -> Head {
        let Some(head) = self.waiting.front() else { return Head::Stays };
        let n_pages = head.positions().div_ceil(PAGE_TOKENS);
        let namespace = namespace(head, &self.options, &self.pins);
        let tokens = head.prefix().map_or(&[][..], |(tokens, _)| tokens);
        let own = head.owns_its_pages();
        let wanted = Wanted { n_pages, tokens, namespace: namespace.as_ref(), own };
        let traffic = head.traffic;
        let mut device = PoolPages { backend: &self.loaded.backend, pool: &mut self.pool };
        let admitted = self.cache.admit(&wanted, &mut device);
        let fault = self.never_fits(n_pages);
        match (admitted, fault) {
            (Err(fault), _) => self.contain_at_admission(fault),
            (Ok(None), None) => Head::Stays,
            (Ok(None), Some(fault)) => {
                if let Some(head) = self.waiting.pop_front() {
                    self.end_waiting(head, Ending::Fault(SequenceFault::KvIntegrity(fault)));
                }
                Head::Left
            }
            (Ok(Some(admitted)), _) => {
                self.count_prefix(traffic, &admitted);
                self.copy_pages(&admitted);
                if let Some(head) = self.waiting.pop_front() {
                    self.running.push(Running::admit(head, admitted, namespace));
                    self.publish();
                }
                if let Some(admitted) = self.running.last() {
                    self.gauges.leave_queue(admitted.tenant.as_deref(), Left::Admitted);
                    admitted.announce();
                    let at = self.running.len() - 1;
                    if let Some(ending) = self.begin(at) {
                        self.retire(at, ending);
                    }
                }
                Head::Left
            }
        }
    }

    fn resume_head(&mut self) -> Head {
        let Some(head) = self.suspended.front() else { return Head::Stays };
        let n_pages = head.n_pages();
        let namespace = head.namespace.as_ref();
        let (tokens, own) = (&head.tokens[..], head.owns_its_pages());
        let wanted = Wanted { n_pages, tokens, namespace, own };
        let mut device = PoolPages { backend: &self.loaded.backend, pool: &mut self.pool };
        let admitted = self.cache.admit(&wanted, &mut device);
        let fault = self.never_fits(n_pages);
        match (admitted, fault) {
            (Err(fault), _) => return self.contain_at_admission(fault),
            (Ok(None), None) => return Head::Stays,
            (Ok(None), Some(fault)) => {
                self.end_suspended(0, Ending::Fault(SequenceFault::KvIntegrity(fault)));
            }
            (Ok(Some(admitted)), _) => {
                self.copy_pages(&admitted);
                if let Some(mut head) = self.suspended.pop_front() {
                    head.take(admitted);
                    self.running.push(head);
                    self.publish();
                }
            }
        }
        Head::Left
    }

    /// The device runs this before whatever it is asked for next, which may write what is copied from.
    fn copy_pages(&mut self, admitted: &Admitted) {
        for &(from, to) in &admitted.copies {
            self.loaded.backend.kv_copy_page(&mut self.pool, from, to);
        }
    }

    /// A fault that takes no page away may come back at once; it gets a turn each time, in which the engine
    /// hears what it is told.
    fn contain_at_admission(&mut self, fault: PageFault) -> Head {
        let has_end = fault.page().is_some();
        self.contain(fault);
        if has_end { Head::Left } else { Head::Stays }
    }

    /// Why a sequence can have so many pages never.
    fn never_fits(&self, needed: usize) -> Option<PageFault> {
        let usable = self.cache.usable();
        (needed > usable).then_some(PageFault::TooFew { needed, usable })
    }

    fn count_prefix(&self, traffic: Traffic, admitted: &Admitted) {
        self.gauges.count(traffic, Total::PrefixHits, admitted.n_cached);
        self.gauges.count(traffic, Total::PrefixMisses, admitted.n_missed);
        self.gauges.count(traffic, Total::PrefixEvictions, admitted.n_evicted);
    }

    /// Behind the logits of one sequence: its whole pages can be found from now on, unless its logits were
    /// no numbers.
    pub(super) fn share_full_pages(&mut self, at: usize, ending: Option<&Ending>) {
        let sequence = &mut self.running[at];
        let is_sound = !matches!(ending, Some(Ending::Fault(_)));
        let Some(namespace) = sequence.namespace.clone().filter(|_| is_sound) else { return };
        if let Some(n_full) = sequence.newly_full()
            && !sequence.owns_its_pages()
        {
            self.cache.share(&namespace, &sequence.tokens, &sequence.pages, n_full);
        }
    }

    /// What [`Worker::share_full_pages`] put off while the sequence might have written its pages again.
    pub(super) fn share_at_the_end(&mut self, at: usize) {
        let sequence = &self.running[at];
        if !sequence.owns_its_pages() {
            return;
        }
        if let Some(namespace) = &sequence.namespace {
            self.cache.share(namespace, &sequence.tokens, &sequence.pages, sequence.n_full());
        }
    }

    /// Before each step; see [`crate::cache::KvCache::check_tables`].
    pub(super) fn check_tables(&mut self) {
        self.until_whole(|worker| {
            let tables: Vec<TableView<'_>> = worker.running.iter().map(Running::view).collect();
            worker.cache.check_tables(&tables)
        });
    }

    /// See [`crate::cache::KvCache::audit`] and [`crate::cache::KvCache::audit_bytes`].
    pub(super) fn audit(&mut self) {
        self.gauges.count(Traffic::User, Total::KvAudits, 1);
        self.until_whole(|worker| {
            let tables: Vec<TableView<'_>> = worker.running.iter().map(Running::view).collect();
            worker.cache.audit(&tables)
        });
        self.until_whole(|worker| {
            let Loaded { backend, .. } = &worker.loaded;
            worker.cache.audit_bytes(&mut PoolPages { backend, pool: &mut worker.pool })
        });
    }

    /// Each finding takes a page or all tables away, so that there is an end.
    fn until_whole(&mut self, check: impl Fn(&mut Self) -> Result<(), PageFault>) {
        while let Err(fault) = check(self) {
            self.contain(fault);
        }
    }

    pub(super) fn contain(&mut self, fault: PageFault) {
        tracing::error!(%fault, "KV integrity: the page is withdrawn and its sequences computed anew");
        self.gauges.count(Traffic::User, Total::KvFaults, 1);
        self.cache.switchboard.caught(Guard::Pages);
        match fault.page() {
            Some(page) => self.withdraw(page, &fault),
            None => self.start_anew(&fault),
        }
        self.publish();
    }

    /// A page goes, and with it each sequence with a stale entry of it, or else the one that took it last.
    fn withdraw(&mut self, page: PageId, fault: &PageFault) {
        let place = |sequence: &Running| sequence.pages.iter().position(|entry| entry.page == page);
        let running = self.running.iter().enumerate();
        let holders = running.filter_map(|(at, sequence)| Some((at, place(sequence)?)));
        let holders: Vec<(usize, usize)> = holders.collect();
        let is_stale =
            |&(at, from): &(usize, usize)| self.cache.is_stale(self.running[at].pages[from]);
        let mut fail: Vec<bool> = holders.iter().map(is_stale).collect();
        if !fail.contains(&true)
            && let Some(last) = fail.last_mut()
        {
            *last = true;
        }
        self.cache.quarantine(page);
        for ((at, from), fails) in holders.into_iter().zip(fail).rev() {
            let sequence = self.take_out(at, Some(from));
            self.restart(sequence, fails, fault);
        }
    }

    /// Nobody knows whose page is whose.
    fn start_anew(&mut self, fault: &PageFault) {
        self.cache.reset();
        for at in (0..self.running.len()).rev() {
            let sequence = self.take_out(at, None);
            self.restart(sequence, false, fault);
        }
    }

    /// A sequence without its pages; nobody finds what they hold from page `forget_from` on. `None`:
    /// the cache knows no tables any more.
    pub(super) fn take_out(&mut self, at: usize, forget_from: Option<usize>) -> Running {
        let mut sequence = self.running.remove(at);
        let table = sequence.take_pages();
        if let Some(from) = forget_from {
            self.cache.forget(&table[from..]);
            let n_stale = self.cache.release(&table);
            self.gauges.count(Traffic::User, Total::KvFaults, n_stale);
        }
        sequence
    }

    /// Computes a sequence anew that has lost its pages, unless it is the one that `fails`.
    fn restart(&mut self, mut sequence: Running, fails: bool, fault: &PageFault) {
        if let Some(flight) = &mut self.flight {
            flight.disown(sequence.id);
        }
        if fails || !sequence.can_restart() {
            let fault = SequenceFault::KvIntegrity(fault.clone());
            return self.finish(sequence, Ending::Fault(fault));
        }
        self.gauges.count(sequence.traffic, Total::KvRestarts, 1);
        sequence.restart();
        // They come from the last to the first.
        self.suspended.push_front(sequence);
    }
}

fn namespace(head: &Waiting, options: &EngineOptions, pins: &Arc<Pins>) -> Option<Namespace> {
    let (_, tenant) = head.prefix().filter(|_| options.prefix_cache)?;
    Some(Namespace { pins: Arc::clone(pins), tenant: tenant.map(Arc::from) })
}

#[cfg(test)]
mod tests;
