//! The graph of a boot (G-02): which phase needs which, what proves that it is done, and how long it may
//! take. A boot runs from this and from nothing else, so what `exrail boot --plan` prints is what happens.

use std::{fmt, time::Duration};

use serde_json::{Value, json};
use thiserror::Error;

use super::Phase;

/// Slowest reading that is not a fault (G-01 P).
const SLOWEST_BYTES_PER_S: u64 = 200_000_000;
/// Limit of a phase that touches only this machine (G-01 P).
const LOCAL: Duration = Duration::from_secs(10);
/// Limit of a phase that reads weights or vectors, however few they are (G-01 P).
const WEIGHTS: Duration = Duration::from_secs(120);
/// Limit of silence of something remote (G-01 P).
const REMOTE: Duration = Duration::from_secs(30);

/// Phases without which nothing is served (G-01 R, G-05 R).
const PROOF: [Phase; 3] = [Phase::WarmUp, Phase::Sentinel, Phase::Ready];

/// How long a phase may take.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Deadline {
    /// So long, whatever it finds.
    Fixed(Duration),
    /// So long, or as long as its bytes take at 200 MB/s.
    ByBytes(Duration),
    /// As long as it makes progress at least so often. For what is fetched, whose time nobody knows.
    Silence(Duration),
}

impl Deadline {
    /// Limits of the whole phase and of its silence, for so many bytes.
    pub(super) fn limits(self, bytes: u64) -> (Option<Duration>, Option<Duration>) {
        match self {
            Self::Fixed(limit) => (Some(limit), None),
            Self::ByBytes(floor) => {
                let reading = Duration::from_secs(bytes / SLOWEST_BYTES_PER_S);
                (Some(floor.max(reading)), None)
            }
            Self::Silence(limit) => (None, Some(limit)),
        }
    }
}

impl fmt::Display for Deadline {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Fixed(limit) => write!(f, "{} s", limit.as_secs()),
            Self::ByBytes(floor) => write!(f, "{} s or bytes / 200 MB/s", floor.as_secs()),
            Self::Silence(limit) => write!(f, "{} s without progress", limit.as_secs()),
        }
    }
}

/// A phase in its place.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Node {
    /// Which.
    pub phase: Phase,
    /// What has to be done before it.
    pub needs: Vec<Phase>,
    /// What shows that it is done, in words; a phase without a probe is refused.
    pub probe: Option<&'static str>,
    /// How long it may take.
    pub deadline: Deadline,
}

impl Node {
    /// A phase of this machine that needs others.
    #[must_use]
    pub fn new(phase: Phase, needs: &[Phase], probe: &'static str) -> Self {
        let deadline = Deadline::Fixed(LOCAL);
        Self { phase, needs: needs.to_vec(), probe: Some(probe), deadline }
    }

    /// The same with another limit.
    #[must_use]
    pub fn within(self, deadline: Deadline) -> Self {
        Self { deadline, ..self }
    }
}

/// What a boot starts beside the generator.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Retrieval {
    /// Nothing.
    Without,
    /// An encoder and collections as they lie on disk.
    AsItIs,
    /// The same, and collections or scales may be made first, which takes as long as it takes.
    Prepared,
}

/// Why a graph is not booted.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
#[non_exhaustive]
pub enum GraphError {
    /// A phase stands in the graph twice.
    #[error("boot graph: expected each phase once, found `{phase}` twice")]
    Twice {
        /// The phase.
        phase: &'static str,
    },
    /// A phase needs one that is not there.
    #[error("boot graph: `{phase}` needs `{unknown}`, which is not in the graph")]
    Unknown {
        /// The phase.
        phase: &'static str,
        /// What it needs.
        unknown: &'static str,
    },
    /// Nothing says when a phase is done.
    #[error("boot graph: expected a probe for `{phase}`, found none")]
    NoProbe {
        /// The phase.
        phase: &'static str,
    },
    /// Phases wait for each other.
    #[error("boot graph: expected an order, found a cycle: {}", path.join(" → "))]
    Cycle {
        /// From a phase over what it needs back to itself.
        path: Vec<&'static str>,
    },
    /// The graph would call an engine ready that has shown nothing.
    #[error("boot graph: expected `{phase}` in it, without which nothing may be served")]
    NoProof {
        /// The phase.
        phase: &'static str,
    },
}

/// A graph that can be booted: every need is in it, every phase has a probe, and there is an order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BootPlan {
    order: Vec<Node>,
}

impl BootPlan {
    /// Checks a graph and puts it in order; phases that may run at once keep the order of [`Phase`].
    ///
    /// # Errors
    /// See [`GraphError`].
    pub fn new(mut nodes: Vec<Node>) -> Result<Self, GraphError> {
        nodes.sort_by_key(|node| node.phase);
        if let Some(pair) = nodes.windows(2).find(|pair| pair[0].phase == pair[1].phase) {
            return Err(GraphError::Twice { phase: pair[0].phase.name() });
        }
        let has = |phase: Phase| nodes.iter().any(|node| node.phase == phase);
        for node in &nodes {
            let phase = node.phase.name();
            if let Some(unknown) = node.needs.iter().find(|&&need| !has(need)) {
                return Err(GraphError::Unknown { phase, unknown: unknown.name() });
            }
            if node.probe.is_none_or(|probe| probe.trim().is_empty()) {
                return Err(GraphError::NoProbe { phase });
            }
        }
        if let Some(missing) = PROOF.into_iter().find(|&phase| !has(phase)) {
            return Err(GraphError::NoProof { phase: missing.name() });
        }
        let mut order: Vec<Node> = Vec::with_capacity(nodes.len());
        while !nodes.is_empty() {
            let done = |need: &Phase| order.iter().any(|node| node.phase == *need);
            let Some(next) = nodes.iter().position(|node| node.needs.iter().all(done)) else {
                return Err(GraphError::Cycle { path: cycle(&nodes) });
            };
            order.push(nodes.remove(next));
        }
        Ok(Self { order })
    }

    /// The graph of a generator, with what is started around it; `keys` where somebody may ask for them.
    ///
    /// # Errors
    /// The graph of this program is wrong, see [`GraphError`].
    pub fn of_generator(retrieval: Retrieval, keys: bool) -> Result<Self, GraphError> {
        use Phase::{
            Config, Device, Encoder, Grammar, Index, KvPool, Policy, Preflight, Ready, Secrets,
            Sentinel, Tokenizer, WarmUp, Weights,
        };
        let reads_weights = Deadline::ByBytes(WEIGHTS);
        let mut nodes = vec![
            Node::new(Config, &[], "options are parsed and frozen"),
            // A model may be fetched here.
            Node::new(
                Preflight,
                &[Config],
                "files have their sha256, and what the manifest declares",
            )
            .within(Deadline::Silence(REMOTE)),
            Node::new(Device, &[Config], "the device opens and says its name"),
            Node::new(
                Weights,
                &[Preflight, Device],
                "every tensor is there in its shape, and it fits",
            )
            .within(reads_weights),
            Node::new(Tokenizer, &[Weights], "golden strings come back as they were"),
            Node::new(KvPool, &[Weights, Tokenizer], "pages are allocated and the engine runs"),
            Node::new(WarmUp, &[KvPool], "10 tokens three times for each bucket, alike each time")
                .within(reads_weights),
        ];
        let mut last = vec![WarmUp];
        if keys {
            nodes.push(Node::new(Secrets, &[Config], "keys are there and long enough"));
            // Only servers are asked for more than one kind of answer.
            nodes.push(
                Node::new(
                    Grammar,
                    &[KvPool],
                    "a schema is compiled, or it is said why none can be",
                )
                .within(Deadline::Fixed(REMOTE)),
            );
            last.extend([Secrets, Grammar]);
        }
        if retrieval != Retrieval::Without {
            // Slow machines compute here: what is not hung must not be given up.
            let reads_index = match retrieval {
                Retrieval::Prepared => Deadline::Silence(WEIGHTS),
                Retrieval::AsItIs | Retrieval::Without => reads_weights,
            };
            nodes.extend([
                Node::new(Encoder, &[Preflight, Device], "a sentence becomes a vector of length 1")
                    .within(reads_weights),
                Node::new(Index, &[Encoder], "collections have the encoder's contract")
                    .within(reads_index),
                Node::new(Policy, &[Index, KvPool], "calibrations fit their encoder and index")
                    .within(reads_index),
            ]);
            last.push(Policy);
        }
        nodes.push(
            Node::new(Sentinel, &last, "a real request is answered, and refused where it must be")
                .within(reads_weights),
        );
        nodes.push(Node::new(Ready, &[Sentinel], "every phase above has succeeded"));
        Self::new(nodes)
    }

    /// The phases in order.
    #[must_use]
    pub fn order(&self) -> &[Node] {
        &self.order
    }

    /// The graph for programs, in order (`bootstrap.dag.json`).
    #[must_use]
    pub fn to_json(&self) -> Value {
        let node = |node: &Node| {
            json!({
                "phase": node.phase.name(),
                "needs": node.needs.iter().map(|need| need.name()).collect::<Vec<_>>(),
                "probe": node.probe,
                "deadline": node.deadline.to_string(),
            })
        };
        json!({ "order": self.order.iter().map(node).collect::<Vec<_>>() })
    }
}

impl fmt::Display for BootPlan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{:10} {:28} {:26} probe", "phase", "needs", "deadline")?;
        for node in &self.order {
            let needs: Vec<_> = node.needs.iter().map(|need| need.name()).collect();
            let (needs, deadline) = (needs.join(", "), node.deadline.to_string());
            let probe = node.probe.unwrap_or_default();
            writeln!(f, "{:10} {needs:28} {deadline:26} {probe}", node.phase.name())?;
        }
        Ok(())
    }
}

/// A cycle among nodes of which each needs another of them.
fn cycle(nodes: &[Node]) -> Vec<&'static str> {
    let among = |phase: &Phase| nodes.iter().find(|node| node.phase == *phase);
    let mut path: Vec<Phase> = Vec::new();
    let mut at = nodes.first();
    while let Some(node) = at {
        if let Some(start) = path.iter().position(|&phase| phase == node.phase) {
            let back = std::iter::once(node.phase);
            return path[start..].iter().copied().chain(back).map(Phase::name).collect();
        }
        path.push(node.phase);
        at = node.needs.iter().find_map(among);
    }
    path.into_iter().map(Phase::name).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The graph of a server as nodes, to be spoilt.
    fn nodes() -> Vec<Node> {
        BootPlan::of_generator(Retrieval::AsItIs, true).unwrap().order
    }

    fn node(nodes: &mut [Node], phase: Phase) -> &mut Node {
        nodes.iter_mut().find(|node| node.phase == phase).unwrap()
    }

    #[test]
    fn the_graph_of_a_server_is_the_order_of_g01() {
        let names: Vec<_> = nodes().iter().map(|node| node.phase.name()).collect();
        let expected = [
            "config",
            "secrets",
            "preflight",
            "device",
            "weights",
            "tokenizer",
            "kv_pool",
            "warmup",
            "grammar",
            "encoder",
            "index",
            "policy",
            "sentinel",
            "ready",
        ];
        assert_eq!(names, expected);
        for retrieval in [Retrieval::Without, Retrieval::AsItIs, Retrieval::Prepared] {
            for keys in [false, true] {
                BootPlan::of_generator(retrieval, keys).unwrap();
            }
        }
    }

    #[test]
    fn a_cycle_is_refused_with_its_path() {
        let mut nodes = nodes();
        node(&mut nodes, Phase::Weights).needs.push(Phase::WarmUp);
        let error = BootPlan::new(nodes).unwrap_err();
        let told =
            "boot graph: expected an order, found a cycle: weights → warmup → kv_pool → weights";
        assert_eq!(error.to_string(), told);
        let mut nodes = self::nodes();
        node(&mut nodes, Phase::Index).needs = vec![Phase::Index];
        let GraphError::Cycle { path } = BootPlan::new(nodes).unwrap_err() else { panic!() };
        assert_eq!(path, ["index", "index"]);
    }

    #[test]
    fn unknown_phases_missing_probes_and_doubles_are_refused_by_name() {
        let mut without = nodes();
        without.retain(|node| node.phase != Phase::Encoder);
        let unknown = GraphError::Unknown { phase: "index", unknown: "encoder" };
        assert_eq!(BootPlan::new(without), Err(unknown));
        for probe in [None, Some(" ")] {
            let mut blind = nodes();
            node(&mut blind, Phase::KvPool).probe = probe;
            assert_eq!(BootPlan::new(blind), Err(GraphError::NoProbe { phase: "kv_pool" }));
        }
        let mut twice = nodes();
        twice.push(Node::new(Phase::Device, &[], "again"));
        assert_eq!(BootPlan::new(twice), Err(GraphError::Twice { phase: "device" }));
        let unproved = vec![Node::new(Phase::Config, &[], "read")];
        assert_eq!(BootPlan::new(unproved), Err(GraphError::NoProof { phase: "warmup" }));
    }

    #[test]
    fn large_files_get_the_time_to_read_them() {
        let limit = |deadline: Deadline, bytes| deadline.limits(bytes).0.map(|it| it.as_secs());
        assert_eq!(limit(Deadline::ByBytes(WEIGHTS), 1 << 20), Some(120));
        assert_eq!(limit(Deadline::ByBytes(WEIGHTS), 140_000_000_000), Some(700));
        assert_eq!(limit(Deadline::Fixed(LOCAL), 140_000_000_000), Some(10));
        assert_eq!(Deadline::Silence(REMOTE).limits(7), (None, Some(REMOTE)));
    }
}
