//! The rules: every crate stands in the table, depends on lower layers only, and only `cli` names a
//! device backend.

use std::fmt;

use crate::table::{Place, Table};

/// Backends of devices; `kernels` holds the trait and the reference, which everybody may name.
const DEVICE_BACKENDS: [&str; 2] = ["kernels-cpu", "kernels-cuda"];

/// The only crate of the layers that chooses a device.
const CHOOSER: &str = "cli";

/// A workspace crate and the workspace crates that it needs outside its tests.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Crate {
    pub(crate) name: String,
    pub(crate) normal: Vec<String>,
}

/// A broken rule.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Violation {
    /// A crate of the workspace without a row.
    NotInTable { name: String },
    /// A row without a crate.
    NotInWorkspace { name: String },
    /// A dependency that does not go down.
    NotDownwards { from: String, from_layer: u32, to: String, to_layer: u32 },
    /// The product needs a tool.
    NeedsBeside { from: String, to: String },
    /// A crate below `cli` has chosen its device.
    NamesDevice { from: String, to: String },
}

impl fmt::Display for Violation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NotInTable { name } => write!(f, "crate `{name}`: expected a row, found none"),
            Self::NotInWorkspace { name } => {
                write!(f, "row `{name}`: expected a crate of the workspace, found none")
            }
            Self::NotDownwards { from, from_layer, to, to_layer } => write!(
                f,
                "`{from}` (layer {from_layer}) depends on `{to}`: expected a layer below \
                 {from_layer}, found {to_layer}"
            ),
            Self::NeedsBeside { from, to } => {
                write!(f, "`{from}` depends on `{to}`: expected a dev-dependency at most")
            }
            Self::NamesDevice { from, to } => {
                write!(f, "`{from}` depends on `{to}`: only `{CHOOSER}` names a device backend")
            }
        }
    }
}

/// All broken rules, in the order of `crates`.
pub(crate) fn check(table: &Table, crates: &[Crate]) -> Vec<Violation> {
    let mut violations: Vec<_> =
        crates.iter().flat_map(|entry| check_crate(table, entry)).collect();
    let is_missing = |name: &&String| !crates.iter().any(|entry| entry.name == **name);
    let missing = table.keys().filter(is_missing);
    violations.extend(missing.map(|name| Violation::NotInWorkspace { name: name.clone() }));
    violations
}

fn check_crate(table: &Table, entry: &Crate) -> Vec<Violation> {
    match table.get(&entry.name) {
        None => vec![Violation::NotInTable { name: entry.name.clone() }],
        Some(Place::Beside) => Vec::new(),
        Some(&Place::Layer(layer)) => {
            entry.normal.iter().flat_map(|to| check_edge(table, &entry.name, layer, to)).collect()
        }
    }
}

/// A dependency without a row is reported once, at its own crate.
fn check_edge(table: &Table, from: &str, from_layer: u32, to: &str) -> Vec<Violation> {
    let (from, to) = (from.to_owned(), to.to_owned());
    let mut violations = Vec::new();
    if DEVICE_BACKENDS.contains(&to.as_str()) && from != CHOOSER {
        violations.push(Violation::NamesDevice { from: from.clone(), to: to.clone() });
    }
    match table.get(&to) {
        Some(&Place::Layer(to_layer)) if to_layer >= from_layer => {
            violations.push(Violation::NotDownwards { from, from_layer, to, to_layer });
        }
        Some(Place::Beside) => violations.push(Violation::NeedsBeside { from, to }),
        Some(Place::Layer(_)) | None => {}
    }
    violations
}

#[cfg(test)]
mod tests {
    use super::*;

    fn table() -> Table {
        let layers = [("tensor", 0), ("kernels", 1), ("kernels-cpu", 2), ("model", 2), ("cli", 5)];
        let mut table: Table =
            layers.map(|(name, layer)| (name.into(), Place::Layer(layer))).into();
        table.insert("testkit".into(), Place::Beside);
        table
    }

    fn graph() -> Vec<Crate> {
        let edges: [(&str, &[&str]); 6] = [
            ("tensor", &[]),
            ("kernels", &["tensor"]),
            ("kernels-cpu", &["kernels", "tensor"]),
            ("model", &["kernels"]),
            ("cli", &["kernels-cpu", "model"]),
            ("testkit", &["cli", "tensor"]),
        ];
        edges
            .map(|(name, normal)| Crate {
                name: name.into(),
                normal: normal.iter().map(|&to| to.into()).collect(),
            })
            .into()
    }

    /// Adds one dependency to the sound graph; the mutation that each rule must catch.
    fn with_edge(from: &str, to: &str) -> Vec<Crate> {
        let mut crates = graph();
        let entry = crates.iter_mut().find(|entry| entry.name == from).unwrap();
        entry.normal.push(to.into());
        crates
    }

    fn told(crates: &[Crate]) -> Vec<String> {
        check(&table(), crates).iter().map(ToString::to_string).collect()
    }

    #[test]
    fn the_sound_graph_passes() {
        assert!(told(&graph()).is_empty());
    }

    #[test]
    fn an_edge_upwards_is_named() {
        let expected = "`tensor` (layer 0) depends on `kernels`: expected a layer below 0, found 1";
        assert_eq!(told(&with_edge("tensor", "kernels")), [expected]);
    }

    #[test]
    fn an_edge_within_a_layer_is_named() {
        let expected = Violation::NotDownwards {
            from: "kernels-cpu".into(),
            from_layer: 2,
            to: "model".into(),
            to_layer: 2,
        };
        assert_eq!(check(&table(), &with_edge("kernels-cpu", "model")), [expected]);
    }

    #[test]
    fn a_device_backend_below_the_binary_is_named() {
        let mut table = table();
        table.insert("model".into(), Place::Layer(3));
        let violations = check(&table, &with_edge("model", "kernels-cpu"));
        let expected = Violation::NamesDevice { from: "model".into(), to: "kernels-cpu".into() };
        assert_eq!(violations, [expected]);
    }

    #[test]
    fn a_layer_that_needs_the_test_kit_is_named() {
        let expected = "`model` depends on `testkit`: expected a dev-dependency at most";
        assert_eq!(told(&with_edge("model", "testkit")), [expected]);
    }

    #[test]
    fn crates_and_rows_match_one_to_one() {
        let mut crates = graph();
        crates.retain(|entry| entry.name != "model");
        crates.push(Crate { name: "gateway".into(), normal: Vec::new() });
        let expected = [
            "crate `gateway`: expected a row, found none",
            "row `model`: expected a crate of the workspace, found none",
        ];
        assert_eq!(told(&crates), expected);
    }
}
