//! Which kind of server there is, what it serves, and what tells that it is still the same.

use std::time::Duration;

use serde_json::{Value, json};
use sha2::{Digest as _, Sha256};

use crate::{
    client::Client,
    fault::UpstreamFault,
    kind::{APIS, Api, Kind},
};

/// How long a question about the server may take; it is no generation.
const LIMIT: Duration = Duration::from_secs(5);
/// Fields of a model's card that say which model it is. Others, such as ids of permissions, differ from one answer to the
/// next.
const CARD: [&str; 7] = ["id", "root", "parent", "owned_by", "max_model_len", "meta", "exrail"];

/// What was found at an address.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Detected {
    /// The kind.
    pub kind: Kind,
    /// By what it was told.
    pub evidence: String,
    /// Its version, where it tells one.
    pub version: Option<String>,
    /// The names that it answers to; the first is the one that is asked when nobody names another.
    pub models: Vec<String>,
    /// SHA-256 of what it says of itself, without what differs from one answer to the next.
    pub fingerprint: String,
}

/// Looks at a server, without having it generate.
///
/// # Errors
/// It does not answer, or not to the gateway's key.
pub async fn detect(client: &Client) -> Result<Detected, UpstreamFault> {
    let listed = match client.get("/v1/models", LIMIT).await {
        // There may be no such route.
        Err(fault @ UpstreamFault::Refused { .. }) => Err(fault),
        // A server that is busy or broken is not one without models.
        Err(fault) => return Err(fault),
        Ok(list) => Ok(list),
    };
    let cards = listed.as_ref().map(|list| list["data"].clone()).unwrap_or_default();
    let owner = cards[0]["owned_by"].as_str();
    let by_owner = APIS.iter().find(|api| api.owned_by.is_some() && api.owned_by == owner);
    let (api, evidence) = match by_owner {
        Some(api) => (api, format!("/v1/models: owned_by {}", owner.unwrap_or_default())),
        None => by_sign(client, listed).await?,
    };
    let card = match api.card {
        None => Value::Null,
        Some((path, fields)) => match client.get(path, LIMIT).await {
            Ok(card) => only(&card, fields),
            // Without a model there is no card, on some.
            Err(UpstreamFault::Refused { .. } | UpstreamFault::Failed { .. }) => Value::Null,
            Err(fault) => return Err(fault),
        },
    };
    let version = api.version.and_then(|field| card[field].as_str()).map(str::to_owned);
    let mut models = names(&cards);
    if api.kind == Kind::TabbyApi {
        // An administrator's key lists every folder; the card is of the model that is loaded.
        models = card["id"].as_str().map(str::to_owned).into_iter().collect();
    }
    let cards = cards.as_array().map(Vec::as_slice).unwrap_or_default();
    let cards: Value = cards.iter().map(|card| only(card, &CARD)).collect();
    let told = json!({ "kind": api.name, "models": models, "card": card, "cards": cards });
    let fingerprint = sha256(&told.to_string());
    Ok(Detected { kind: api.kind, evidence, version, models, fingerprint })
}

/// The kind whose own route answers, or that of every server with a list of models.
async fn by_sign(
    client: &Client,
    listed: Result<Value, UpstreamFault>,
) -> Result<(&'static Api, String), UpstreamFault> {
    for api in &APIS {
        let Some((path, place, expected)) = api.sign else { continue };
        let Ok(answer) = client.get(path, LIMIT).await else { continue };
        let found = answer.pointer(place).filter(|found| !found.is_null());
        if found.is_some_and(|found| expected.is_none_or(|expected| found == expected)) {
            return Ok((api, format!("{path} answers as {} does", api.name)));
        }
    }
    let list = listed?;
    if !list["data"].is_array() {
        return Err(UpstreamFault::NoAnswer { expected: "a list `data` of models at /v1/models" });
    }
    Ok((Kind::OpenAi.api(), "/v1/models lists models of nobody that is known".to_owned()))
}

fn names(cards: &Value) -> Vec<String> {
    let cards = cards.as_array().map(Vec::as_slice).unwrap_or_default();
    // Encoders of exrail answer no chat.
    let generators = cards.iter().filter(|card| card["exrail"]["kind"] != "encoder");
    generators.filter_map(|card| card["id"].as_str()).map(str::to_owned).collect()
}

/// An object with these fields alone.
fn only(value: &Value, fields: &[&str]) -> Value {
    let of = |name: &&str| Some(((*name).to_owned(), value.get(*name)?.clone()));
    fields.iter().filter_map(of).collect()
}

/// SHA-256 of a text, 64 hexadecimal digits.
pub(crate) fn sha256(text: &str) -> String {
    Sha256::digest(text).iter().map(|byte| format!("{byte:02x}")).collect()
}
