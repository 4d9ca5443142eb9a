//! The λ probe: one item asked in three wordings with two seeds, with evidence retrieved once
//! (`frozen`) and per wording (`live`), so that a retrieval fault and a generation fault can be
//! told apart (§1.3.3).

use std::collections::BTreeSet;

use exrail_metrics::retrieve_converges;
use exrail_retrieval::Hit;
use serde::Serialize;

use crate::ask::{AskPolicy, retrieve};
use crate::error::VerifyError;
use crate::evidence_gate::EvidenceGate;
use crate::gold::GoldItem;
use crate::runs::{
    Asking, Attempt, ModeLambda, assembled_alike, majority_matches, nonce_of, summarise,
};
use crate::system::{Generate, Retrieve};

/// λ of one gold item in both modes.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct ItemLambda {
    /// The item.
    pub id: String,
    /// Evidence retrieved once, with the item's own question.
    pub frozen: ModeLambda,
    /// Evidence retrieved for each wording.
    pub live: ModeLambda,
    /// Whether the wordings retrieve the same snippets: mean pairwise Jaccard ≥ 0.70.
    pub retrieve_convergent: bool,
    /// Whether template, role order and slot order were the same in all runs that had a prompt.
    pub assemble_convergent: bool,
    /// Whether the largest class of the live runs holds a reference answer. λ is stability, not
    /// truth.
    pub matches_gold: bool,
}

/// Probes one item. `calibrated_ds` gives ΔS of two answers on the text↔text scale, or nothing
/// where no fit encoder is at hand. Greedy sampling makes seeds void, so then there is one run
/// per wording.
///
/// # Errors
/// The index failed, or the generator failed otherwise than by time or numbers, which are
/// outcomes.
pub fn lambda_probe(
    (generator, index): (&dyn Generate, &dyn Retrieve),
    gate: &EvidenceGate,
    policy: &AskPolicy,
    item: &GoldItem,
    calibrated_ds: &mut dyn FnMut(&str, &str) -> Option<f64>,
) -> Result<ItemLambda, VerifyError> {
    probed((generator, index), gate, policy, item, calibrated_ds).map(|(lambda, _)| lambda)
}

/// [`lambda_probe`], with the runs over frozen evidence.
pub(crate) fn probed(
    (generator, index): (&dyn Generate, &dyn Retrieve),
    gate: &EvidenceGate,
    policy: &AskPolicy,
    item: &GoldItem,
    calibrated_ds: &mut dyn FnMut(&str, &str) -> Option<f64>,
) -> Result<(ItemLambda, Vec<Attempt>), VerifyError> {
    let paraphrases = item.asked();
    let frozen_hits = retrieve(index, &item.question, policy)?;
    let live_hits = retrieve_each(index, paraphrases, policy)?;
    let nonce = nonce_of(&item.id, index.index_hash());
    let asking = Asking { generator, gate, policy, nonce: &nonce };
    let [frozen, live] =
        asking.over(paraphrases, [&|_| &frozen_hits, &|index: usize| &live_hits[index]])?;
    let live_lambda = summarise(&live, calibrated_ds)?;
    let matches_gold = majority_matches(&live, &live_lambda.classes(), &item.answers);
    let lambda = ItemLambda {
        id: item.id.clone(),
        frozen: summarise(&frozen, calibrated_ds)?,
        live: live_lambda,
        retrieve_convergent: wordings_retrieve_alike(&live_hits),
        assemble_convergent: assembled_alike(frozen.iter().chain(&live)),
        matches_gold,
    };
    Ok((lambda, frozen))
}

/// The evidence of each wording.
pub(crate) fn retrieve_each(
    index: &dyn Retrieve,
    paraphrases: &[String],
    policy: &AskPolicy,
) -> Result<Vec<Vec<Hit>>, VerifyError> {
    paraphrases.iter().map(|paraphrase| retrieve(index, paraphrase, policy)).collect()
}

/// Whether the wordings find the same snippets (§1.3.7).
pub(crate) fn wordings_retrieve_alike(live_hits: &[Vec<Hit>]) -> bool {
    let ids = |hits: &Vec<Hit>| -> BTreeSet<String> {
        hits.iter().map(|hit| hit.chunk.snippet_id.clone()).collect()
    };
    retrieve_converges(&live_hits.iter().map(ids).collect::<Vec<_>>())
}
