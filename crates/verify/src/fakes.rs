//! A small world for tests, of this crate and of others: an encoder that counts words, an index that ranks by it, a corpus of
//! 60 facts on 15 pages, and generators given as closures.

use std::collections::HashMap;
use std::ops::Range;
use std::sync::{Arc, Mutex};

use exrail_metrics::content_words;
use exrail_retrieval::{
    BlockType, Chunk, ChunkSpan, Document, DocumentFormat, EmbeddingFacts, Encode, EncodeError,
    EncoderFacts, Hit, SearchOptions, Section, SpanUnit, TokenizerFacts,
};

use serde_json::Value;

use crate::prompt::{FrameMessage, PromptFrame, REFUSAL_TOKEN};
use crate::system::{
    Generate, GenerateError, Generated, GeneratedEnd, GeneratorFacts, OfSchema, Placed, Retrieve,
    RetrieveError, SamplingKind,
};

const DIM: usize = 1024;

/// Bag of content words: each new word gets the next dimension.
#[derive(Default)]
pub struct WordEncoder {
    words: Mutex<HashMap<String, usize>>,
}

impl Encode for WordEncoder {
    fn fingerprint(&self) -> &'static str {
        "word-encoder"
    }

    fn facts(&self) -> EncoderFacts {
        EncoderFacts {
            name: "word-encoder".to_owned(),
            dim: DIM,
            max_tokens: 60,
            pooling: "sum".to_owned(),
            normalized: true,
            metric: "cosine".to_owned(),
            query_prefix: String::new(),
            passage_prefix: String::new(),
            tokenizer_fp: "words".to_owned(),
        }
    }

    fn tokenize(&self, text: &str) -> Vec<(u32, Range<usize>)> {
        let start = text.as_ptr() as usize;
        let place = |word: &str| {
            let at = word.as_ptr() as usize - start;
            (0, at..at + word.len())
        };
        text.split_whitespace().map(place).collect()
    }

    fn encode(&self, texts: &[&str]) -> Result<Vec<Vec<f32>>, EncodeError> {
        let mut words = self.words.lock().expect("the small world holds");
        let mut vectors = Vec::new();
        for (index, text) in texts.iter().enumerate() {
            let mut vector = vec![0.0f32; DIM];
            for word in content_words(text) {
                let next = words.len();
                vector[*words.entry(word).or_insert(next)] = 1.0;
            }
            let norm = vector.iter().map(|x| x * x).sum::<f32>().sqrt();
            if norm == 0.0 {
                return Err(EncodeError::Empty { index });
            }
            vectors.push(vector.into_iter().map(|x| x / norm).collect());
        }
        Ok(vectors)
    }
}

pub(crate) fn chunk(doc_id: &str, start: usize, text: &str) -> Chunk {
    Chunk {
        snippet_id: format!("{:016x}", fnv(&format!("{doc_id} {start} {text}"))),
        doc_id: doc_id.to_owned(),
        section_id: section_id(doc_id, start),
        rev: "r1".to_owned(),
        source_url: doc_id.to_owned(),
        span: ChunkSpan {
            start,
            end: start + text.len(),
            unit: SpanUnit::Byte,
            line_start: 1,
            line_end: 1,
        },
        tokens: text.split_whitespace().count(),
        lang: "en".to_owned(),
        block_type: BlockType::Prose,
        anchor: String::new(),
        text: text.to_owned(),
        text_sha256: String::new(),
        contract_sha256: String::new(),
        tokenizer: TokenizerFacts {
            name: String::new(),
            version: String::new(),
            hash: String::new(),
            case: String::new(),
            unicode_norm: String::new(),
        },
        embedding: EmbeddingFacts {
            encoder_fp: String::new(),
            dim: DIM,
            metric: "cosine".to_owned(),
            normalized: true,
            pooling: String::new(),
        },
    }
}

pub(crate) fn hit(doc_id: &str, start: usize, text: &str, cosine: f32) -> Hit {
    Hit {
        chunk: Arc::new(chunk(doc_id, start, text)),
        score_raw: cosine,
        score_norm: cosine,
        cosine,
        rank_lexical: None,
        rank_vector: None,
        k_pos: 1,
    }
}

fn fnv(text: &str) -> u64 {
    text.bytes().fold(0xcbf2_9ce4_8422_2325, |hash, byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
    })
}

/// Documents whose lines are chunks and sections.
pub struct FakeIndex {
    documents: Vec<Arc<Document>>,
    chunks: Vec<(Arc<Chunk>, Vec<f32>)>,
    /// What made its vectors.
    pub encoder: Arc<WordEncoder>,
    /// [`Retrieve::index_hash`].
    pub hash: String,
    /// The index is up but finds nothing.
    pub finds_nothing: bool,
}

impl FakeIndex {
    /// An index of these documents, each a name and a text.
    ///
    /// # Panics
    /// A line has no word.
    #[must_use]
    pub fn of_texts(texts: &[(&str, &str)]) -> FakeIndex {
        FakeIndex::cut(texts, |text| {
            lines(text).map(|line| line.start..line.start + text[line].trim_end().len()).collect()
        })
    }

    /// The same with chunks that are cut elsewhere; lines are sections nevertheless.
    ///
    /// # Panics
    /// A chunk has no word.
    #[must_use]
    pub fn cut(texts: &[(&str, &str)], cut: impl Fn(&str) -> Vec<Range<usize>>) -> FakeIndex {
        let encoder = Arc::new(WordEncoder::default());
        let (mut documents, mut chunks) = (Vec::new(), Vec::new());
        for (doc_id, text) in texts {
            for span in cut(text) {
                let chunk = chunk(doc_id, span.start, &text[span]);
                let vector = encoder.encode(&[&chunk.text]).expect("a chunk has words").remove(0);
                chunks.push((Arc::new(chunk), vector));
            }
            documents.push(Arc::new(document(doc_id, text)));
        }
        FakeIndex { documents, chunks, encoder, hash: "index-1".to_owned(), finds_nothing: false }
    }

    /// Lets the chunks of one document say that they are another's.
    pub fn mistake(&mut self, doc_id: &str, for_doc_id: &str) {
        for (chunk, _) in &mut self.chunks {
            if chunk.doc_id == doc_id {
                Arc::make_mut(chunk).doc_id = for_doc_id.to_owned();
            }
        }
    }

    /// Puts a heading above a section.
    #[cfg(test)]
    pub(crate) fn title(&mut self, doc_id: &str, section_id: &str, title: &str) {
        let document = self
            .documents
            .iter_mut()
            .find(|it| it.doc_id == doc_id)
            .expect("the small world holds");
        let mut sections = Arc::make_mut(document).sections.iter_mut();
        sections.find(|it| it.section_id == section_id).expect("the small world holds").path =
            vec![title.to_owned()];
    }
}

/// The bytes of each line, its break included.
fn lines(text: &str) -> impl Iterator<Item = Range<usize>> {
    text.split_inclusive('\n').scan(0, |start, line| {
        let from = *start;
        *start += line.len();
        Some(from..*start)
    })
}

fn document(doc_id: &str, text: &str) -> Document {
    let sections = lines(text).map(|span| Section {
        section_id: section_id(doc_id, span.start),
        title: String::new(),
        path: Vec::new(),
        anchor: String::new(),
        span,
    });
    Document {
        doc_id: doc_id.to_owned(),
        rev: "r1".to_owned(),
        source_url: doc_id.to_owned(),
        lang: "en".to_owned(),
        format: DocumentFormat::Markdown,
        text: text.to_owned(),
        sections: sections.collect(),
        blocks: Vec::new(),
    }
}

fn section_id(doc_id: &str, start: usize) -> String {
    format!("{doc_id}#{start}")
}

impl Retrieve for FakeIndex {
    fn search(&self, question: &str, options: &SearchOptions) -> Result<Vec<Hit>, RetrieveError> {
        if self.finds_nothing {
            return Ok(Vec::new());
        }
        let vector = self.encoder.encode(&[question]).expect("the small world holds").remove(0);
        // A question has few words, so few of its numbers are not 0.
        let words: Vec<(usize, f32)> =
            vector.into_iter().enumerate().filter(|(_, value)| *value != 0.0).collect();
        let mut hits: Vec<Hit> = self
            .chunks
            .iter()
            .filter(|(chunk, _)| !options.mask_docs.contains(&chunk.doc_id))
            .map(|(chunk, other)| {
                let cosine: f32 = words.iter().map(|(at, value)| value * other[*at]).sum();
                let base = hit("", 0, "", cosine);
                Hit { chunk: Arc::clone(chunk), ..base }
            })
            .collect();
        hits.sort_by(|a, b| {
            b.cosine.total_cmp(&a.cosine).then_with(|| a.chunk.section_id.cmp(&b.chunk.section_id))
        });
        hits.truncate(options.k);
        Ok(hits)
    }

    fn document(&self, doc_id: &str) -> Result<Option<Arc<Document>>, RetrieveError> {
        Ok(self.documents.iter().find(|document| document.doc_id == doc_id).cloned())
    }

    fn doc_ids(&self) -> Vec<String> {
        self.documents.iter().map(|document| document.doc_id.clone()).collect()
    }

    fn index_hash(&self) -> &str {
        &self.hash
    }

    fn encoder_fp(&self) -> &str {
        self.encoder.fingerprint()
    }

    fn n_chunks(&self) -> usize {
        self.chunks.len()
    }

    fn chunks(&self) -> Box<dyn Iterator<Item = &Arc<Chunk>> + '_> {
        Box::new(self.chunks.iter().map(|(chunk, _)| chunk))
    }
}

/// An index that searches by a closure over the sound one.
pub struct Altered<'a, F> {
    index: &'a FakeIndex,
    search: F,
}

impl<'a, F: Fn(&FakeIndex, &str, &SearchOptions) -> Vec<Hit>> Altered<'a, F> {
    /// The index that finds what `search` says.
    pub fn new(index: &'a FakeIndex, search: F) -> Altered<'a, F> {
        Altered { index, search }
    }
}

impl<F: Fn(&FakeIndex, &str, &SearchOptions) -> Vec<Hit>> Retrieve for Altered<'_, F> {
    fn search(&self, question: &str, options: &SearchOptions) -> Result<Vec<Hit>, RetrieveError> {
        Ok((self.search)(self.index, question, options))
    }

    fn document(&self, doc_id: &str) -> Result<Option<Arc<Document>>, RetrieveError> {
        self.index.document(doc_id)
    }

    fn doc_ids(&self) -> Vec<String> {
        self.index.doc_ids()
    }

    fn index_hash(&self) -> &str {
        self.index.index_hash()
    }

    fn encoder_fp(&self) -> &str {
        self.index.encoder_fp()
    }

    fn n_chunks(&self) -> usize {
        self.index.n_chunks()
    }

    fn chunks(&self) -> Box<dyn Iterator<Item = &Arc<Chunk>> + '_> {
        self.index.chunks()
    }
}

/// Replies by a closure over the messages and the seed.
pub struct FakeGenerator<F> {
    /// What it says.
    pub reply: F,
    /// How it samples.
    pub sampling: SamplingKind,
    /// Most words of a prompt.
    pub prompt_limit: usize,
    /// Words of the last message that it reads, from behind, when somebody on the way to it cuts the prompt.
    pub reads: usize,
    /// Where the slots of a prompt come to stand.
    pub place: fn(&PromptFrame) -> Vec<Option<[usize; 2]>>,
    /// What it says when a schema is asked for.
    pub object: fn(&[FrameMessage], &Value) -> OfSchema,
}

/// Each slot behind the one before it.
#[must_use]
pub fn in_order(prompt: &PromptFrame) -> Vec<Option<[usize; 2]>> {
    (0..prompt.slots().len()).map(|at| Some([at * 100, at * 100 + 99])).collect()
}

/// An object of the probe's schema, as a lock on the tokens would have it.
#[must_use]
pub fn locked(_messages: &[FrameMessage], _schema: &Value) -> OfSchema {
    let text = r#"{"answer":"107 units","kind":"number","certain":true}"#.to_owned();
    OfSchema { text, allowed_mass_min: Some(0.4) }
}

impl<F: Fn(&[FrameMessage], u64) -> String> FakeGenerator<F> {
    /// A generator that says what `reply` says, and has no fault beside.
    pub fn new(reply: F) -> FakeGenerator<F> {
        FakeGenerator {
            reply,
            sampling: SamplingKind::Seeded,
            prompt_limit: 10_000,
            reads: usize::MAX,
            place: in_order,
            object: locked,
        }
    }

    fn said(&self, messages: &[FrameMessage], seed: u64) -> Result<Generated, GenerateError> {
        let read = self.read(messages);
        let text = (self.reply)(&read, seed);
        let n_output_tokens = text.split_whitespace().count();
        let n_prompt_tokens = self.count_tokens(&read)?;
        let (end, n_cached_tokens) = (GeneratedEnd::Stop, 0);
        Ok(Generated { text, end, n_prompt_tokens, n_output_tokens, n_cached_tokens })
    }
}

impl<F> FakeGenerator<F> {
    /// What of the messages reaches it.
    fn read(&self, messages: &[FrameMessage]) -> Vec<FrameMessage> {
        let mut read = messages.to_vec();
        if let Some(last) = read.last_mut().filter(|_| self.reads < usize::MAX) {
            let mut ends = last.content.rmatch_indices([' ', '\n']);
            let cut = ends.nth(self.reads).map_or(0, |(at, _)| at + 1);
            last.content.drain(..cut);
        }
        read
    }
}

impl<F: Fn(&[FrameMessage], u64) -> String> Generate for FakeGenerator<F> {
    fn generate(&self, prompt: &PromptFrame, seed: u64) -> Result<Generated, GenerateError> {
        self.said(prompt.messages(), seed)
    }

    /// The closure sees what the model's turn begins with as a message of its own.
    fn generate_step(
        &self,
        prompt: &PromptFrame,
        so_far: &str,
        seed: u64,
    ) -> Result<Generated, GenerateError> {
        let mut messages = prompt.messages().to_vec();
        messages.push(FrameMessage { role: "assistant", content: so_far.to_owned() });
        self.said(&messages, seed)
    }

    fn generate_of_schema(
        &self,
        messages: &[FrameMessage],
        schema: &Value,
        _seed: u64,
    ) -> Result<OfSchema, GenerateError> {
        Ok((self.object)(messages, schema))
    }

    fn place(&self, prompt: &PromptFrame) -> Result<Placed, GenerateError> {
        let n_tokens = self.count_tokens(prompt.messages())?;
        Ok(Placed { n_tokens, slots: (self.place)(prompt) })
    }

    fn count_tokens(&self, messages: &[FrameMessage]) -> Result<usize, GenerateError> {
        Ok(messages.iter().map(|message| message.content.split_whitespace().count()).sum())
    }

    fn token_ends(&self, text: &str) -> Result<Vec<usize>, GenerateError> {
        Ok(text.match_indices(' ').map(|(at, _)| at).chain([text.len()]).collect())
    }

    fn prompt_limit(&self) -> usize {
        self.prompt_limit
    }

    fn facts(&self) -> Result<GeneratorFacts, GenerateError> {
        Ok(GeneratorFacts {
            model: "fake-135m".to_owned(),
            model_fp: "5af571cbf074e6d21a03528d2330792e".to_owned(),
            tok_fp: "tok".to_owned(),
            template_hash: "template".to_owned(),
            engine_build: "test".to_owned(),
            quant: "Q4_1".to_owned(),
            kv_dtype: "f16".to_owned(),
            device: "cpu".to_owned(),
            sampling: self.sampling,
        })
    }
}

/// Says one thing after the other, and remembers behind what and with which seed it was asked.
#[cfg(test)]
pub(crate) struct Scripted {
    replies: Vec<(String, GeneratedEnd)>,
    calls: Mutex<Vec<(String, u64)>>,
}

#[cfg(test)]
impl Scripted {
    pub(crate) fn new(replies: &[&str]) -> Scripted {
        let stopped = |reply: &&str| ((*reply).to_owned(), GeneratedEnd::Stop);
        Scripted { replies: replies.iter().map(stopped).collect(), calls: Mutex::default() }
    }

    pub(crate) fn ending(replies: &[(&str, GeneratedEnd)]) -> Scripted {
        let replies = replies.iter().map(|(text, end)| ((*text).to_owned(), *end)).collect();
        Scripted { replies, calls: Mutex::default() }
    }

    pub(crate) fn calls(&self) -> Vec<(String, u64)> {
        self.calls.lock().expect("the small world holds").clone()
    }
}

#[cfg(test)]
impl Generate for Scripted {
    fn generate(&self, prompt: &PromptFrame, seed: u64) -> Result<Generated, GenerateError> {
        self.generate_step(prompt, "", seed)
    }

    fn generate_step(
        &self,
        prompt: &PromptFrame,
        so_far: &str,
        seed: u64,
    ) -> Result<Generated, GenerateError> {
        let mut calls = self.calls.lock().expect("the small world holds");
        let (text, end) = self.replies[calls.len()].clone();
        calls.push((so_far.to_owned(), seed));
        Ok(Generated {
            n_prompt_tokens: self.count_tokens(prompt.messages())?,
            n_output_tokens: text.split_whitespace().count(),
            n_cached_tokens: so_far.split_whitespace().count(),
            text,
            end,
        })
    }

    fn generate_of_schema(
        &self,
        messages: &[FrameMessage],
        schema: &Value,
        seed: u64,
    ) -> Result<OfSchema, GenerateError> {
        FakeGenerator::new(perfect).generate_of_schema(messages, schema, seed)
    }

    fn place(&self, prompt: &PromptFrame) -> Result<Placed, GenerateError> {
        FakeGenerator::new(perfect).place(prompt)
    }

    fn count_tokens(&self, messages: &[FrameMessage]) -> Result<usize, GenerateError> {
        FakeGenerator::new(perfect).count_tokens(messages)
    }

    fn token_ends(&self, text: &str) -> Result<Vec<usize>, GenerateError> {
        FakeGenerator::new(perfect).token_ends(text)
    }

    fn prompt_limit(&self) -> usize {
        10_000
    }

    fn facts(&self) -> Result<GeneratorFacts, GenerateError> {
        FakeGenerator::new(perfect).facts()
    }
}

/// The sources of a prompt, by label from 1.
#[must_use]
pub fn sources(messages: &[FrameMessage]) -> Vec<String> {
    let user = &messages[1].content;
    let lines = user.lines().filter(|line| line.starts_with("[S"));
    lines.map(|line| line.split_once("] ").expect("the small world holds").1.to_owned()).collect()
}

/// Copies the best source and cites it; says so where it reads none.
#[must_use]
pub fn perfect(messages: &[FrameMessage], _seed: u64) -> String {
    match sources(messages).first() {
        Some(source) => format!("[S1] {source}"),
        None => REFUSAL_TOKEN.to_owned(),
    }
}

const N_ITEMS: usize = 60;
const PER_PAGE: usize = 4;

/// "The gamma7 of alpha7 beta7 is 107 units."
fn fact(item: usize) -> String {
    format!("The gamma{item} of alpha{item} beta{item} is {} units.", 100 + item)
}

/// 15 pages of four facts each.
#[must_use]
pub fn corpus() -> FakeIndex {
    with_pages(FakeIndex::of_texts)
}

/// What is made of the pages of [`corpus`].
pub fn with_pages<T>(make: impl FnOnce(&[(&str, &str)]) -> T) -> T {
    let pages: Vec<(String, String)> = (0..N_ITEMS / PER_PAGE)
        .map(|page| {
            let lines = (0..PER_PAGE).map(|line| fact(page * PER_PAGE + line) + "\n");
            (format!("page{page}.md"), lines.collect())
        })
        .collect();
    let texts: Vec<(&str, &str)> = pages.iter().map(|(id, text)| (&**id, &**text)).collect();
    make(&texts)
}

/// 60 answerable, 60 unanswerable and 60 off-topic questions over [`corpus`].
#[must_use]
pub fn gold_text() -> String {
    use std::fmt::Write as _;
    let mut text = String::new();
    for i in 0..N_ITEMS {
        let question = format!("What is the gamma{i} of alpha{i} beta{i} units");
        let item = serde_json::json!({
            "id": format!("a{i}"), "kind": "answerable", "question": format!("{question}?"),
            "paraphrases": [
                format!("{question}, please?"), format!("Tell: {question}."), format!("{question} exactly?")
            ],
            "answers": [format!("{} units", 100 + i)],
            "evidence": [{"doc": format!("page{}.md", i / PER_PAGE), "quote": fact(i)}],
            "anchor_mode": "all",
        });
        writeln!(text, "{item}").expect("the small world holds");
        let question = format!("What is the delta{i} epsilon{i} of alpha{i} units?");
        writeln!(text, r#"{{"id":"u{i}","kind":"unanswerable","question":"{question}"}}"#)
            .expect("the small world holds");
        let question = format!("Who sang song{i} in year{i}?");
        writeln!(text, r#"{{"id":"o{i}","kind":"off_topic","question":"{question}"}}"#)
            .expect("the small world holds");
    }
    text
}
