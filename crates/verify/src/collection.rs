//! A collection as the system under test sees it.

use std::collections::BTreeMap;
use std::sync::Arc;

use exrail_retrieval::{
    Chunk, Collection, Document, Encode, Hit, RememberingEncoder, SearchOptions,
};

use crate::system::{Retrieve, RetrieveError};

/// A collection with the encoder of its questions. The documents are shared, not copied per call.
pub struct CollectionIndex {
    collection: Arc<Collection>,
    encoder: Arc<dyn Encode>,
    documents: BTreeMap<String, Arc<Document>>,
}

impl CollectionIndex {
    /// Takes the collection as it is now.
    #[must_use]
    pub fn new(collection: Collection, encoder: Arc<dyn Encode>) -> CollectionIndex {
        let shared = |document: &Document| (document.doc_id.clone(), Arc::new(document.clone()));
        let documents = collection.documents().map(shared).collect();
        CollectionIndex { collection: Arc::new(collection), encoder, documents }
    }

    /// The same collection, with an encoder that computes each text once.
    #[must_use]
    pub fn remembering(&self) -> CollectionIndex {
        CollectionIndex {
            collection: Arc::clone(&self.collection),
            encoder: Arc::new(RememberingEncoder::new(Arc::clone(&self.encoder))),
            documents: self.documents.clone(),
        }
    }

    /// The collection.
    #[must_use]
    pub fn collection(&self) -> &Collection {
        &self.collection
    }

    /// The encoder that made its vectors.
    #[must_use]
    pub fn encoder(&self) -> &Arc<dyn Encode> {
        &self.encoder
    }
}

impl Retrieve for CollectionIndex {
    fn search(&self, question: &str, options: &SearchOptions) -> Result<Vec<Hit>, RetrieveError> {
        let found = self.collection.search(question, &*self.encoder, options);
        found.map_err(|error| RetrieveError(Box::new(error)))
    }

    fn document(&self, doc_id: &str) -> Result<Option<Arc<Document>>, RetrieveError> {
        Ok(self.documents.get(doc_id).cloned())
    }

    fn doc_ids(&self) -> Vec<String> {
        self.documents.keys().cloned().collect()
    }

    fn index_hash(&self) -> &str {
        self.collection.index_hash()
    }

    fn encoder_fp(&self) -> &str {
        // The collection refuses a search with any other encoder, so the two are one.
        self.encoder.fingerprint()
    }

    fn n_chunks(&self) -> usize {
        self.collection.len()
    }

    fn chunks(&self) -> Box<dyn Iterator<Item = &Arc<Chunk>> + '_> {
        Box::new(self.collection.chunks().iter())
    }
}
