//! Who leaves the queue next. Pure: jobs in, one job out; no device, no clock, no channel.
//!
//! Tenants share what is admitted, counted in tokens (prompt and the most that may follow), and each
//! tenant's priorities share what it gets, 4 to 2 to 1. Next is the first of whoever has been given
//! least; one that had nothing to wait for starts where the last one stood, so that nobody
//! saves up (start-time fair queueing, Goyal, Vin and Cheng 1996). A priority therefore moves a request
//! before its own tenant's others and never before somebody else's.
//!
//! # Why nobody starves
//! While a job waits its lane stands still and every job that is admitted moves another lane on by at
//! least one token, so that its lane is the least one after a bounded number of tokens. Then its head is
//! *elected*: it waits for pages, and nobody passes it, not even one with less.

use std::collections::VecDeque;

use crate::request::Priority;

/// What the tenants' shares are counted by.
pub(crate) trait Queued {
    /// Whose job it is.
    fn tenant(&self) -> Option<&str>;
    /// Before which of the same tenant's others.
    fn priority(&self) -> Priority;
    /// Tokens that it may take.
    fn cost(&self) -> u64;
}

const N_CLASSES: usize = 3;

/// By how much a token moves a high, a normal and a low priority on: 4 over the weight.
const STRIDES: [u64; N_CLASSES] = [1, 2, 4];

/// Jobs that wait.
#[derive(Debug)]
pub(crate) struct FairQueue<J> {
    lanes: Vec<Lane<J>>,
    /// Where the lane stood that was served last.
    clock: u64,
    /// Lane and class of the head that nobody passes.
    elected: Option<(usize, usize)>,
    len: usize,
}

/// The jobs of one tenant.
#[derive(Debug)]
struct Lane<J> {
    tenant: Option<Box<str>>,
    /// Tokens admitted, or where it started.
    served: u64,
    /// Where the class stood that was served last.
    clock: u64,
    /// By priority, the highest first.
    classes: [Class<J>; N_CLASSES],
}

/// The jobs of one priority, first in, first out.
#[derive(Debug)]
struct Class<J> {
    /// Tokens admitted times the stride, or where it started.
    served: u64,
    jobs: VecDeque<J>,
}

impl<J> Default for FairQueue<J> {
    fn default() -> FairQueue<J> {
        FairQueue { lanes: Vec::new(), clock: 0, elected: None, len: 0 }
    }
}

impl<J: Queued> FairQueue<J> {
    pub(crate) fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Puts a job behind those of its tenant and priority.
    pub(crate) fn push(&mut self, job: J) {
        if self.is_empty() {
            // Nobody waited: there is nothing to share, and no debt to keep.
            *self = FairQueue::default();
        }
        let at = self.lane(job.tenant());
        let clock = self.clock;
        let lane = &mut self.lanes[at];
        if lane.is_empty() {
            lane.served = lane.served.max(clock);
        }
        let class = &mut lane.classes[class_idx(job.priority())];
        if class.jobs.is_empty() {
            class.served = class.served.max(lane.clock);
        }
        class.jobs.push_back(job);
        self.len += 1;
    }

    /// The next one. It stays the next one until it is taken.
    pub(crate) fn front(&mut self) -> Option<&J> {
        let (lane, class) = self.elect()?;
        self.lanes[lane].classes[class].jobs.front()
    }

    /// Takes the next one.
    pub(crate) fn pop_front(&mut self) -> Option<J> {
        let (at, class_idx) = self.elect()?;
        let lane = &mut self.lanes[at];
        let class = &mut lane.classes[class_idx];
        let job = class.jobs.pop_front()?;
        let cost = job.cost().max(1);
        lane.clock = class.served;
        class.served += cost * STRIDES[class_idx];
        self.clock = lane.served;
        lane.served += cost;
        self.elected = None;
        self.len -= 1;
        Some(job)
    }

    /// Takes out whatever `leaves`, in no order.
    pub(crate) fn extract(&mut self, leaves: impl Fn(&J) -> bool) -> Vec<J> {
        let mut taken = Vec::new();
        for (lane_idx, lane) in self.lanes.iter_mut().enumerate() {
            for (class_idx, class) in lane.classes.iter_mut().enumerate() {
                if !class.jobs.iter().any(&leaves) {
                    continue;
                }
                let is_elected = self.elected == Some((lane_idx, class_idx));
                if is_elected && class.jobs.front().is_some_and(&leaves) {
                    self.elected = None;
                }
                let (gone, kept) = class.jobs.drain(..).partition::<Vec<J>, _>(&leaves);
                class.jobs.extend(kept);
                taken.extend(gone);
            }
        }
        self.len -= taken.len();
        taken
    }

    /// Lane and class of the next job. Ties go to the lane that came first and to the higher priority.
    fn elect(&mut self) -> Option<(usize, usize)> {
        if self.elected.is_none() {
            let lanes = self.lanes.iter().enumerate().filter(|(_, lane)| !lane.is_empty());
            let (at, lane) = lanes.min_by_key(|(_, lane)| lane.served)?;
            let classes = lane.classes.iter().enumerate();
            let classes = classes.filter(|(_, class)| !class.jobs.is_empty());
            let (class, _) = classes.min_by_key(|(_, class)| class.served)?;
            self.elected = Some((at, class));
        }
        self.elected
    }

    /// The lane of a tenant: its own, or one whose tenant is owed nothing and owes nothing.
    fn lane(&mut self, tenant: Option<&str>) -> usize {
        if let Some(at) = self.lanes.iter().position(|lane| lane.tenant.as_deref() == tenant) {
            return at;
        }
        let lane = Lane::new(tenant);
        let is_over = |lane: &Lane<J>| lane.is_empty() && lane.served <= self.clock;
        if let Some(at) = self.lanes.iter().position(is_over) {
            self.lanes[at] = lane;
            return at;
        }
        self.lanes.push(lane);
        self.lanes.len() - 1
    }
}

impl<J> Lane<J> {
    fn new(tenant: Option<&str>) -> Lane<J> {
        let class = || Class { served: 0, jobs: VecDeque::new() };
        let classes = [class(), class(), class()];
        Lane { tenant: tenant.map(Box::from), served: 0, clock: 0, classes }
    }

    fn is_empty(&self) -> bool {
        self.classes.iter().all(|class| class.jobs.is_empty())
    }
}

fn class_idx(priority: Priority) -> usize {
    match priority {
        Priority::High => 0,
        Priority::Normal => 1,
        Priority::Low => 2,
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const TENANTS: [Option<&str>; 3] = [None, Some("a"), Some("b")];
    const PRIORITIES: [Priority; N_CLASSES] = [Priority::High, Priority::Normal, Priority::Low];
    const MAX_COST: u64 = 50;

    #[derive(Clone, Debug, PartialEq)]
    struct Job {
        tenant: Option<&'static str>,
        priority: Priority,
        cost: u64,
        number: usize,
    }

    impl Queued for Job {
        fn tenant(&self) -> Option<&str> {
            self.tenant
        }
        fn priority(&self) -> Priority {
            self.priority
        }
        fn cost(&self) -> u64 {
            self.cost
        }
    }

    fn job(tenant: &'static str, priority: Priority, cost: u64, number: usize) -> Job {
        Job { tenant: Some(tenant), priority, cost, number }
    }

    fn numbers(queue: &mut FairQueue<Job>) -> Vec<usize> {
        std::iter::from_fn(|| queue.pop_front()).map(|job| job.number).collect()
    }

    #[test]
    fn a_flood_of_one_tenant_does_not_delay_another() {
        let run = |other: &'static str| {
            let mut queue = FairQueue::default();
            (0..50).for_each(|n| queue.push(job("flood", Priority::Normal, 10, n)));
            queue.pop_front();
            queue.push(job(other, Priority::Normal, 10, 100));
            numbers(&mut queue).iter().position(|&number| number == 100)
        };
        assert_eq!(run("other"), Some(0));
        // The mutation: a queue that knows no tenants.
        assert_eq!(run("flood"), Some(49));
    }

    #[test]
    fn shares_are_of_tokens_and_not_of_requests() {
        let mut queue = FairQueue::default();
        for n in 0..8 {
            queue.push(job("long", Priority::Normal, 40, n));
            queue.push(job("short", Priority::Normal, 10, 100 + n));
        }
        let order = numbers(&mut queue);
        // After one long one, four short ones.
        assert_eq!(order[..6], [0, 100, 101, 102, 103, 1]);
    }

    #[test]
    fn a_priority_goes_before_its_own_tenant_and_not_before_another() {
        let mut queue = FairQueue::default();
        (0..3).for_each(|n| queue.push(job("a", Priority::Normal, 10, n)));
        queue.pop_front();
        (0..9).for_each(|n| queue.push(job("a", Priority::High, 10, 10 + n)));
        (0..3).for_each(|n| queue.push(job("b", Priority::Low, 10, 20 + n)));
        assert_eq!(numbers(&mut queue)[..6], [20, 10, 21, 11, 22, 12]);
    }

    #[test]
    fn who_waited_for_nothing_saves_nothing_up() {
        let mut queue = FairQueue::default();
        (0..20).for_each(|n| queue.push(job("a", Priority::Normal, 10, n)));
        (0..10).for_each(|_| assert!(queue.pop_front().is_some()));
        // Ten jobs later it shares from now on, and does not get the next ten.
        (0..10).for_each(|n| queue.push(job("b", Priority::Normal, 10, 100 + n)));
        assert_eq!(numbers(&mut queue)[..4], [100, 10, 101, 11]);
    }

    #[test]
    fn an_elected_head_is_not_passed_and_makes_room_when_it_leaves() {
        let mut queue = FairQueue::default();
        queue.push(job("a", Priority::Low, 900, 0));
        assert_eq!(queue.front().map(|job| job.number), Some(0));
        queue.push(job("a", Priority::High, 1, 1));
        queue.push(job("b", Priority::High, 1, 2));
        assert_eq!(queue.front().map(|job| job.number), Some(0), "it waits for pages");
        assert_eq!(queue.extract(|job| job.number == 0).len(), 1);
        assert_eq!(numbers(&mut queue), [1, 2]);
        assert!(queue.is_empty() && queue.front().is_none());
    }

    #[test]
    fn tenants_that_come_and_go_leave_no_lanes() {
        let names: Vec<&'static str> = (0..500).map(|n| &*format!("key-{n}").leak()).collect();
        let mut queue = FairQueue::default();
        queue.push(job("stays", Priority::Normal, 1, 0));
        for (n, name) in names.into_iter().enumerate() {
            queue.push(job("stays", Priority::Normal, 1, n));
            queue.push(job(name, Priority::Normal, 1, n));
            queue.pop_front();
            queue.pop_front();
        }
        assert!(queue.lanes.len() < 5, "{}", queue.lanes.len());
    }

    /// What a random server does.
    #[derive(Clone, Debug)]
    enum Action {
        Push {
            tenant: usize,
            class: usize,
            cost: u64,
        },
        /// Looks at the head, which may have to wait then.
        Look,
        Pop,
        Extract(usize),
    }

    fn actions() -> impl Strategy<Value = Vec<Action>> {
        let action = prop_oneof![
            5 => (0..3_usize, 0..3_usize, 1..=MAX_COST)
                .prop_map(|(tenant, class, cost)| Action::Push { tenant, class, cost }),
            1 => Just(Action::Look),
            4 => Just(Action::Pop),
            1 => any::<usize>().prop_map(Action::Extract),
        ];
        prop::collection::vec(action, 1..300)
    }

    /// Tokens of each lane since a lane last waited for nothing.
    #[derive(Default)]
    struct Since {
        tokens: [u64; 3],
    }

    proptest! {
        #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]
        /// Against a naive list: nothing is lost, each class is first in, first out, and while a tenant
        /// has something waiting, nobody gets more than it by more than three of the largest jobs: one of
        /// each of the two, and one that was elected before.
        #[test]
        fn every_tenant_that_waits_gets_its_share(actions in actions()) {
            let mut queue = FairQueue::default();
            let mut waiting: Vec<Job> = Vec::new();
            let mut since: [Since; 3] = Default::default();
            for (number, action) in actions.into_iter().enumerate() {
                match action {
                    Action::Push { tenant, class, cost } => {
                        let (tenant, priority) = (TENANTS[tenant], PRIORITIES[class]);
                        let job = Job { tenant, priority, cost, number };
                        queue.push(job.clone());
                        waiting.push(job);
                    }
                    Action::Look => prop_assert_eq!(queue.front().is_some(), !waiting.is_empty()),
                    Action::Extract(at) if !waiting.is_empty() => {
                        let gone = waiting.remove(at % waiting.len());
                        prop_assert_eq!(queue.extract(|job| job.number == gone.number), [gone]);
                    }
                    Action::Extract(_) => {}
                    Action::Pop => {
                        let popped = queue.pop_front();
                        prop_assert_eq!(popped.is_some(), !waiting.is_empty());
                        let Some(popped) = popped else { continue };
                        let same = |job: &&Job| (job.tenant, job.priority) == (popped.tenant, popped.priority);
                        prop_assert_eq!(waiting.iter().find(same), Some(&popped));
                        waiting.retain(|job| job.number != popped.number);
                        for since in &mut since {
                            let at = TENANTS.iter().position(|&tenant| tenant == popped.tenant);
                            since.tokens[at.unwrap()] += popped.cost;
                        }
                    }
                }
                for (at, since) in since.iter_mut().enumerate() {
                    if waiting.iter().all(|job| job.tenant != TENANTS[at]) {
                        *since = Since::default();
                    }
                    for tokens in since.tokens {
                        prop_assert!(tokens <= since.tokens[at] + 3 * MAX_COST, "{:?}", since.tokens);
                    }
                }
            }
        }

        /// Of a tenant with all priorities waiting each gets its weight, within one job of each.
        #[test]
        fn no_priority_starves_another(costs in prop::collection::vec(1..=MAX_COST, 300)) {
            let mut queue = FairQueue::default();
            for (number, &cost) in costs.iter().enumerate() {
                queue.push(job("a", PRIORITIES[number % N_CLASSES], cost, number));
            }
            let mut tokens = [0; N_CLASSES];
            // As long as none of them has nothing left.
            for _ in 0..100 {
                let popped = queue.pop_front().unwrap();
                tokens[class_idx(popped.priority)] += popped.cost;
                for (a, b) in [(0, 1), (1, 2), (0, 2)] {
                    let share = |class: usize| tokens[class] * STRIDES[class];
                    let bound = (STRIDES[a] + STRIDES[b]) * MAX_COST;
                    prop_assert!(share(a).abs_diff(share(b)) <= bound, "{tokens:?}");
                }
            }
        }
    }
}
