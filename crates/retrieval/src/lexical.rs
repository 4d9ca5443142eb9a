//! The BM25 index: tantivy, held in memory, its files handed to and taken from the collection.
//!
//! Queries are built here from terms. No query language is parsed, so no question can be a syntax
//! error, and operators in it are words.

use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use tantivy::collector::TopDocs;
use tantivy::directory::{Directory, RamDirectory};
use tantivy::query::{BooleanQuery, BoostQuery, Occur, Query, TermQuery};
use tantivy::schema::{FAST, Field, IndexRecordOption, Schema, TextFieldIndexing, TextOptions};
use tantivy::tokenizer::{
    AsciiFoldingFilter, Language, LowerCaser, RemoveLongFilter, SimpleTokenizer, Stemmer,
    TextAnalyzer,
};
use tantivy::{Index, IndexReader, ReloadPolicy, TantivyDocument, Term};

use crate::{Chunk, RetrievalError};

/// Name of the rules below; part of the collection's contract. Change it with them.
pub(crate) const ANALYZER: &str = "bm25-english-1";

const STEMMED: &str = "exrail_stemmed";
const RAW: &str = "exrail_raw";

/// Longest word in bytes; longer ones are data, not words.
const LONGEST_WORD: usize = 80;

/// Memory for building; a collection that needs more spills inside tantivy.
const BUILD_BYTES: usize = 64 << 20;

/// Distinct words of a question that are looked up; the rest adds nothing to BM25 but time.
const QUERY_WORDS: usize = 64;

/// Weights of the fields next to 1 for the stemmed text [N].
const TITLE_WEIGHT: f32 = 0.5;
const RAW_WEIGHT: f32 = 0.5;

/// Words of questions that select nothing. Looked up only if a question has no others.
const STOP_WORDS: [&str; 56] = [
    "a", "about", "an", "and", "any", "are", "as", "at", "be", "by", "can", "could", "did", "do",
    "does", "for", "from", "had", "has", "have", "how", "i", "if", "in", "is", "it", "its", "me",
    "my", "of", "on", "or", "our", "should", "so", "that", "the", "their", "there", "these",
    "they", "this", "to", "was", "we", "were", "what", "when", "where", "which", "who", "why",
    "will", "with", "would", "you",
];

/// A file of the index: its name and bytes.
pub(crate) type Files = BTreeMap<String, Vec<u8>>;

/// An open index. Document `i` of it is chunk `i` of the collection.
pub(crate) struct Lexical {
    fields: Fields,
    stemmed: TextAnalyzer,
    raw: TextAnalyzer,
    reader: IndexReader,
}

#[derive(Clone, Copy)]
struct Fields {
    ordinal: Field,
    text: Field,
    title: Field,
    raw: Field,
}

fn schema() -> (Schema, Fields) {
    let words = |tokenizer: &str| {
        TextOptions::default().set_indexing_options(
            TextFieldIndexing::default()
                .set_tokenizer(tokenizer)
                .set_index_option(IndexRecordOption::WithFreqs),
        )
    };
    let mut builder = Schema::builder();
    let fields = Fields {
        ordinal: builder.add_u64_field("ordinal", FAST),
        text: builder.add_text_field("text", words(STEMMED)),
        title: builder.add_text_field("title", words(STEMMED)),
        raw: builder.add_text_field("raw", words(RAW)),
    };
    (builder.build(), fields)
}

fn raw_analyzer() -> TextAnalyzer {
    TextAnalyzer::builder(SimpleTokenizer::default())
        .filter(RemoveLongFilter::limit(LONGEST_WORD))
        .filter(LowerCaser)
        .build()
}

fn stemmed_analyzer() -> TextAnalyzer {
    TextAnalyzer::builder(SimpleTokenizer::default())
        .filter(RemoveLongFilter::limit(LONGEST_WORD))
        .filter(LowerCaser)
        .filter(AsciiFoldingFilter)
        .filter(Stemmer::new(Language::English))
        .build()
}

/// Builds the index of `chunks`; `titles` gives the heading path of a section by its id.
pub(crate) fn build(
    chunks: &[Arc<Chunk>],
    titles: &HashMap<&str, String>,
) -> Result<Files, RetrievalError> {
    let (schema, fields) = schema();
    let directory = RamDirectory::create();
    let builder = Index::builder().schema(schema).tokenizers(tokenizers());
    // One segment, written on this thread: the document order is the chunk order.
    let mut writer =
        builder.single_segment_index_writer::<TantivyDocument>(directory.clone(), BUILD_BYTES)?;
    for (ordinal, chunk) in chunks.iter().enumerate() {
        let mut document = TantivyDocument::new();
        document.add_u64(fields.ordinal, ordinal as u64);
        document.add_text(fields.text, &chunk.text);
        if let Some(title) = titles.get(chunk.section_id.as_str()) {
            document.add_text(fields.title, title);
        }
        document.add_text(fields.raw, &chunk.text);
        writer.add_document(document)?;
    }
    let index = writer.finalize()?;
    let mut paths: Vec<PathBuf> = index.directory().list_managed_files().into_iter().collect();
    paths.push(PathBuf::from("meta.json"));
    let mut files = Files::new();
    for path in paths {
        // Read below tantivy's own layer: it would strip the checksum at the end of each file.
        if directory.exists(&path).map_err(tantivy::TantivyError::from)? {
            let slice = directory.open_read(&path).map_err(tantivy::TantivyError::from)?;
            let bytes = slice.read_bytes().map_err(tantivy::TantivyError::from)?;
            files.insert(path.to_string_lossy().into_owned(), bytes.as_slice().to_vec());
        }
    }
    Ok(files)
}

fn tokenizers() -> tantivy::tokenizer::TokenizerManager {
    // The default set is kept: tantivy asks for its `default` even for the number field.
    let manager = tantivy::tokenizer::TokenizerManager::default();
    manager.register(STEMMED, stemmed_analyzer());
    manager.register(RAW, raw_analyzer());
    manager
}

impl Lexical {
    /// Opens an index out of the files that [`build`] gave.
    pub(crate) fn open(files: &Files) -> Result<Lexical, RetrievalError> {
        let directory = RamDirectory::create();
        for (name, bytes) in files {
            directory.atomic_write(Path::new(name), bytes).map_err(tantivy::TantivyError::from)?;
        }
        let mut index = Index::open(directory)?;
        index.set_tokenizers(tokenizers());
        let reader = index.reader_builder().reload_policy(ReloadPolicy::Manual).try_into()?;
        let (_, fields) = schema();
        Ok(Lexical { fields, stemmed: stemmed_analyzer(), raw: raw_analyzer(), reader })
    }

    /// Number of indexed chunks.
    pub(crate) fn len(&self) -> usize {
        usize::try_from(self.reader.searcher().num_docs()).unwrap_or(usize::MAX)
    }

    /// The best `limit` chunks for a question: place of the chunk and BM25 score, best first.
    pub(crate) fn search(
        &self,
        question: &str,
        limit: usize,
    ) -> Result<Vec<(usize, f32)>, RetrievalError> {
        let query = self.query(question);
        if query.clauses().is_empty() || limit == 0 {
            return Ok(Vec::new());
        }
        let searcher = self.reader.searcher();
        let top = searcher.search(&query, &TopDocs::with_limit(limit).order_by_score())?;
        let mut found = Vec::with_capacity(top.len());
        for (score, address) in top {
            let segment = searcher.segment_reader(address.segment_ord);
            let ordinals = segment.fast_fields().u64("ordinal")?;
            if let Some(ordinal) = ordinals.first(address.doc_id) {
                found.push((usize::try_from(ordinal).unwrap_or(usize::MAX), score));
            }
        }
        Ok(found)
    }

    fn query(&self, question: &str) -> BooleanQuery {
        let mut raw = words(&self.raw, question);
        let telling: Vec<String> =
            raw.iter().filter(|word| !STOP_WORDS.contains(&word.as_str())).cloned().collect();
        if !telling.is_empty() {
            raw = telling;
        }
        let stemmed = words(&self.stemmed, &raw.join(" "));
        let mut clauses: Vec<(Occur, Box<dyn Query>)> = Vec::new();
        let mut add = |field, word: &str, weight| {
            let term = Term::from_field_text(field, word);
            let query = TermQuery::new(term, IndexRecordOption::WithFreqs);
            clauses.push((Occur::Should, Box::new(BoostQuery::new(Box::new(query), weight))));
        };
        for word in &stemmed {
            add(self.fields.text, word, 1.0);
            add(self.fields.title, word, TITLE_WEIGHT);
        }
        for word in &raw {
            add(self.fields.raw, word, RAW_WEIGHT);
        }
        BooleanQuery::new(clauses)
    }
}

/// The first distinct words of `text`, in order.
fn words(analyzer: &TextAnalyzer, text: &str) -> Vec<String> {
    let mut words: Vec<String> = Vec::new();
    let mut analyzer = analyzer.clone();
    let mut stream = analyzer.token_stream(text);
    while words.len() < QUERY_WORDS && stream.advance() {
        let word = &stream.token().text;
        if !words.contains(word) {
            words.push(word.clone());
        }
    }
    words
}
