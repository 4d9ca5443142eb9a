//! The suite passes the reference, and each fault put into one operation fails the part of that operation.

use std::sync::{Arc, Mutex};

use exrail_kernels::conformance::{ConformanceError, Topic, run, run_topic};
use exrail_kernels::reference::{Reference, ReferenceKvPool, ReferenceWeight};
use exrail_kernels::{
    Activation, AttentionShape, AttentionSpan, Backend, Draw, Draws, GateActivation, HeadRows,
    KernelError, KvDtype, KvMove, KvShape, KvSlot, Largest, NormKind, Normed, PAGE_TOKENS, PageId,
    Places, Rope, RopeStyle, Span, TokenId, WeightView,
};

/// What is wrong with a [`Faulty`] backend.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fault {
    AcceptsShortWeights,
    SwapsShape,
    StaleBuffer,
    EmbedsNextRow,
    EmbedsUnscaled,
    EmbedsFoundUnscaled,
    FindsOneRowLess,
    /// A later question overwrites the answer to an earlier one.
    KeepsOneAnswer,
    NormWithoutEps,
    NormIsAlwaysRms,
    NormInPlaceOfOneRow,
    NormAddOverwrites,
    LayerNormUnbiased,
    LinearDropsBias,
    LinearSkipsLastRow,
    LargestBeyondTheLimit,
    DrawsTheLargest,
    DrawsAtOneTemperature,
    DrawsWithoutTopK,
    DrawsWithoutTopP,
    DrawsWithoutMinP,
    DrawsByOneNumber,
    DrawsBeyondTheLimit,
    DrawsInOrderOfWeight,
    DrawsBesideNan,
    LinearAddOverwrites,
    LinearAddUnscaled,
    AddsRowsInOrder,
    AddsRowsWithOneScale,
    AddsRowsUnscaled,
    QkvDropsBiases,
    GateSwapsUp,
    GateIsAlwaysSilu,
    GeluByTanh,
    QkvUnnormed,
    GateUnnormed,
    LogitsUnnormed,
    LargestUnnormed,
    DrawUnnormed,
    PlacesUnnormed,
    PlacesUnrotated,
    NormPlacesUnnormed,
    NormPlacesUnrotated,
    NormPlacesWithoutBiases,
    RopeOtherStyle,
    RopeFromZero,
    RopeWithoutMagnitude,
    HalfPrecisionIgnored,
    Int8Ignored,
    WritesLayerZero,
    SeesTheFuture,
    IgnoresThePageTable,
    IgnoresTheScale,
    IgnoresTheCap,
    WindowOneLonger,
    WindowOneShorter,
    WrongGroup,
    CopiesNothing,
    MovesNothing,
    MovesOneLess,
    MovesUnturned,
    MovesTurnedTheOtherWay,
    MovesTheLastFirst,
    MovesLayerZero,
    MovesRoundAgain,
    ReadsNothingOfAPage,
    ReadsAnotherPage,
    WritesNoPage,
    WritesBesideThePage,
    WritesHalfAPage,
    JoinsSpans,
    GathersFirst,
    AddsOneLess,
    ScalesOnly,
    CapsOnly,
    MeanIsSum,
    WritesTheTail,
    /// Not a fault where [`Activation::Int8`] is declared.
    RoundsActivations,
}

const FAULTS: [Fault; 77] = [
    Fault::EmbedsFoundUnscaled,
    Fault::FindsOneRowLess,
    Fault::KeepsOneAnswer,
    Fault::LargestBeyondTheLimit,
    Fault::DrawsTheLargest,
    Fault::DrawsAtOneTemperature,
    Fault::DrawsWithoutTopK,
    Fault::DrawsWithoutTopP,
    Fault::DrawsWithoutMinP,
    Fault::DrawsByOneNumber,
    Fault::DrawsBeyondTheLimit,
    Fault::DrawsInOrderOfWeight,
    Fault::DrawsBesideNan,
    Fault::DrawUnnormed,
    Fault::AcceptsShortWeights,
    Fault::SwapsShape,
    Fault::StaleBuffer,
    Fault::EmbedsNextRow,
    Fault::EmbedsUnscaled,
    Fault::NormWithoutEps,
    Fault::NormIsAlwaysRms,
    Fault::NormInPlaceOfOneRow,
    Fault::NormAddOverwrites,
    Fault::LayerNormUnbiased,
    Fault::LinearDropsBias,
    Fault::LinearSkipsLastRow,
    Fault::LinearAddOverwrites,
    Fault::LinearAddUnscaled,
    Fault::AddsRowsInOrder,
    Fault::AddsRowsWithOneScale,
    Fault::AddsRowsUnscaled,
    Fault::QkvDropsBiases,
    Fault::GateSwapsUp,
    Fault::GateIsAlwaysSilu,
    Fault::GeluByTanh,
    Fault::QkvUnnormed,
    Fault::GateUnnormed,
    Fault::LogitsUnnormed,
    Fault::LargestUnnormed,
    Fault::PlacesUnnormed,
    Fault::PlacesUnrotated,
    Fault::NormPlacesUnnormed,
    Fault::NormPlacesUnrotated,
    Fault::NormPlacesWithoutBiases,
    Fault::RopeOtherStyle,
    Fault::RopeFromZero,
    Fault::RopeWithoutMagnitude,
    Fault::HalfPrecisionIgnored,
    Fault::Int8Ignored,
    Fault::WritesLayerZero,
    Fault::SeesTheFuture,
    Fault::IgnoresThePageTable,
    Fault::IgnoresTheScale,
    Fault::IgnoresTheCap,
    Fault::WindowOneLonger,
    Fault::WindowOneShorter,
    Fault::WrongGroup,
    Fault::CopiesNothing,
    Fault::MovesNothing,
    Fault::MovesOneLess,
    Fault::MovesUnturned,
    Fault::MovesTurnedTheOtherWay,
    Fault::MovesTheLastFirst,
    Fault::MovesLayerZero,
    Fault::MovesRoundAgain,
    Fault::ReadsNothingOfAPage,
    Fault::ReadsAnotherPage,
    Fault::WritesNoPage,
    Fault::WritesBesideThePage,
    Fault::WritesHalfAPage,
    Fault::JoinsSpans,
    Fault::GathersFirst,
    Fault::AddsOneLess,
    Fault::ScalesOnly,
    Fault::CapsOnly,
    Fault::MeanIsSum,
    Fault::WritesTheTail,
];

#[test]
fn the_reference_conforms_to_itself() {
    run(&Reference, Activation::F32).unwrap();
}

#[test]
fn activations_rounded_to_int8_pass_their_bound_and_fail_the_exact_one() {
    let rounding = Faulty::new(Fault::RoundsActivations);
    run(&rounding, Activation::Int8).unwrap();
    let error = run_topic(&rounding, Activation::F32, Topic::Linear).unwrap_err();
    assert!(error.to_string().starts_with("linear F32"), "{error}");
}

/// What the error of a fault begins with.
fn operation_of(fault: Fault) -> &'static str {
    match fault {
        Fault::AcceptsShortWeights => "weight with a byte short",
        Fault::SwapsShape => "embed",
        Fault::StaleBuffer => "buffer of 1000",
        Fault::EmbedsNextRow | Fault::EmbedsUnscaled => "embed",
        Fault::EmbedsFoundUnscaled | Fault::FindsOneRowLess | Fault::KeepsOneAnswer => {
            "embed_found F32"
        }
        Fault::NormWithoutEps | Fault::WritesTheTail => "norm Rms",
        Fault::NormIsAlwaysRms => "norm Layer",
        Fault::NormInPlaceOfOneRow => "norm_in_place",
        Fault::NormAddOverwrites => "norm_add",
        Fault::LayerNormUnbiased => "layer_norm",
        Fault::LinearDropsBias | Fault::LinearSkipsLastRow | Fault::RoundsActivations => {
            "linear F32"
        }
        Fault::LargestBeyondTheLimit => "linear_largest F32",
        Fault::DrawsTheLargest
        | Fault::DrawsAtOneTemperature
        | Fault::DrawsWithoutTopK
        | Fault::DrawsWithoutTopP
        | Fault::DrawsWithoutMinP
        | Fault::DrawsByOneNumber
        | Fault::DrawsBeyondTheLimit
        | Fault::DrawsInOrderOfWeight
        | Fault::DrawsBesideNan => "draw ",
        Fault::LinearAddOverwrites | Fault::LinearAddUnscaled => "linear_add F32",
        Fault::AddsRowsInOrder | Fault::AddsRowsWithOneScale | Fault::AddsRowsUnscaled => {
            "linear_add_rows"
        }
        Fault::QkvDropsBiases => "linear_qkv",
        Fault::GateSwapsUp => "linear_gate Silu",
        Fault::GateIsAlwaysSilu => "linear_gate GeluTanh",
        Fault::GeluByTanh => "linear_gelu",
        Fault::QkvUnnormed
        | Fault::GateUnnormed
        | Fault::LogitsUnnormed
        | Fault::LargestUnnormed
        | Fault::DrawUnnormed => "normed q",
        Fault::PlacesUnnormed | Fault::PlacesUnrotated => "place_heads",
        Fault::NormPlacesUnnormed | Fault::NormPlacesUnrotated | Fault::NormPlacesWithoutBiases => {
            "norm_place"
        }
        Fault::RopeOtherStyle | Fault::RopeFromZero | Fault::RopeWithoutMagnitude => "rope",
        Fault::HalfPrecisionIgnored => "attention F16",
        Fault::Int8Ignored => "attention Int8",
        Fault::WritesLayerZero
        | Fault::SeesTheFuture
        | Fault::IgnoresThePageTable
        | Fault::IgnoresTheScale
        | Fault::IgnoresTheCap
        | Fault::WindowOneLonger
        | Fault::WindowOneShorter
        | Fault::WrongGroup
        | Fault::CopiesNothing
        | Fault::ReadsNothingOfAPage
        | Fault::ReadsAnotherPage
        | Fault::WritesNoPage
        | Fault::WritesBesideThePage
        | Fault::WritesHalfAPage => "attention F32",
        Fault::MovesNothing
        | Fault::MovesOneLess
        | Fault::MovesUnturned
        | Fault::MovesTurnedTheOtherWay
        | Fault::MovesTheLastFirst
        | Fault::MovesRoundAgain
        | Fault::MovesLayerZero => "kv_move F32",
        Fault::JoinsSpans => "attention_full",
        Fault::GathersFirst => "gather_rows",
        Fault::AddsOneLess => "add",
        Fault::ScalesOnly | Fault::CapsOnly => "scale_and_cap",
        Fault::MeanIsSum => "mean_rows",
    }
}

/// The part of the suite whose errors begin so.
fn topic_of(operation: &str) -> Topic {
    let topics = [
        ("norm_place", Topic::Fused),
        ("place_heads", Topic::Fused),
        ("normed q", Topic::Fused),
        ("norm", Topic::Norm),
        ("layer_norm", Topic::Norm),
        ("rope", Topic::Rope),
        ("embed", Topic::Linear),
        ("linear", Topic::Linear),
        ("attention_full", Topic::AttentionFull),
        ("attention", Topic::Attention),
        ("kv_move", Topic::Moves),
        ("draw", Topic::Draws),
    ];
    let named = topics.iter().find(|(beginning, _)| operation.starts_with(beginning));
    named.map_or(Topic::Memory, |(_, topic)| *topic)
}

#[test]
fn every_fault_is_caught_at_its_operation() {
    for fault in FAULTS {
        let operation = operation_of(fault);
        let error = run_topic(&Faulty::new(fault), Activation::F32, topic_of(operation))
            .expect_err(&format!("{fault:?} must not pass the suite"));
        let text = error.to_string();
        assert!(text.starts_with(operation), "{fault:?}: {text}");
        let is_overrun = matches!(error, ConformanceError::Overrun { .. });
        assert!(is_overrun || fault != Fault::WritesTheTail, "{error}");
    }
}

/// The reference with one fault.
struct Faulty {
    fault: Fault,
    only_answer: Answer,
}

type Answer = Arc<Mutex<Vec<Largest>>>;

impl Faulty {
    fn new(fault: Fault) -> Faulty {
        Faulty { fault, only_answer: Answer::default() }
    }

    fn is(&self, fault: Fault) -> bool {
        self.fault == fault
    }

    fn answer(&self, mut rows: Vec<Largest>) -> Answer {
        if self.is(Fault::FindsOneRowLess) {
            rows.pop();
        }
        let keeps_one = self.is(Fault::KeepsOneAnswer);
        let answer = if keeps_one { Arc::clone(&self.only_answer) } else { Answer::default() };
        *answer.lock().expect("nothing panics with it") = rows;
        answer
    }

    /// The activations that matrix products see: on a grid of 255 steps per 32 of a row.
    fn activations(&self, x: &[f32], weight: &ReferenceWeight) -> Vec<f32> {
        let mut x = x.to_vec();
        if self.is(Fault::RoundsActivations) {
            let (_, columns) = Reference.weight_shape(weight);
            for run in x.chunks_mut(columns).flat_map(|row| row.chunks_mut(32)) {
                let step = run.iter().fold(0.0f32, |m, x| m.max(x.abs())) / 127.0;
                if step > 0.0 {
                    run.iter_mut().for_each(|x| *x = (*x / step).round() * step);
                }
            }
        }
        x
    }
}

fn weight_rows(weight: &ReferenceWeight) -> usize {
    Reference.weight_shape(weight).0
}

/// Draws along the weights, the heaviest first, and not along the ids.
fn in_order_of_weight(x: &[f32], width: usize, draws: Draws<'_>) -> Vec<Largest> {
    let draw = |(row, draw): (&[f32], &Draw)| {
        let mut order: Vec<usize> = (0..draws.limit).collect();
        order.sort_by(|&a, &b| row[b].total_cmp(&row[a]));
        let sorted: Vec<f32> = order.iter().map(|&n| row[n]).collect();
        let drawn = Draws { limit: draws.limit, rows: &[*draw] }.of_rows(&sorted, draws.limit)[0];
        Largest { index: order[drawn.index as usize] as u32, ..drawn }
    };
    x.chunks_exact(width).zip(draws.rows).map(draw).collect()
}

impl Backend for Faulty {
    type Weight = ReferenceWeight;
    type Buffer = Vec<f32>;
    type KvPool = ReferenceKvPool;
    type Found = Answer;

    fn name(&self) -> String {
        format!("reference with {:?}", self.fault)
    }

    fn weight(&self, view: &WeightView<'_>) -> Result<ReferenceWeight, KernelError> {
        if self.is(Fault::AcceptsShortWeights) {
            let len = view.dtype.row_bytes(view.columns).unwrap_or(0) * view.rows;
            let mut bytes = view.bytes.to_vec();
            bytes.resize(len, 0);
            return Reference.weight(&WeightView { bytes: &bytes, ..*view });
        }
        Reference.weight(view)
    }

    fn weight_shape(&self, weight: &ReferenceWeight) -> (usize, usize) {
        let (rows, columns) = Reference.weight_shape(weight);
        if self.is(Fault::SwapsShape) { (columns, rows) } else { (rows, columns) }
    }

    fn buffer(&self, len: usize) -> Result<Vec<f32>, KernelError> {
        Ok(vec![if self.is(Fault::StaleBuffer) { 1.0 } else { 0.0 }; len])
    }

    fn write(&self, buffer: &mut Vec<f32>, values: &[f32]) {
        Reference.write(buffer, values);
    }

    fn read(&self, buffer: &Vec<f32>, values: &mut [f32]) {
        Reference.read(buffer, values);
    }

    fn kv_pool(&self, shape: KvShape) -> Result<ReferenceKvPool, KernelError> {
        let dtype = match shape.dtype {
            KvDtype::F16 if self.is(Fault::HalfPrecisionIgnored) => KvDtype::F32,
            KvDtype::Int8 if self.is(Fault::Int8Ignored) => KvDtype::F32,
            dtype @ (KvDtype::F32 | KvDtype::F16 | KvDtype::Int8) => dtype,
        };
        Reference.kv_pool(KvShape { dtype, ..shape })
    }

    fn kv_copy_page(&self, pool: &mut ReferenceKvPool, from: PageId, to: PageId) {
        if !self.is(Fault::CopiesNothing) {
            Reference.kv_copy_page(pool, from, to);
        }
    }

    fn kv_move(
        &self,
        pool: &mut ReferenceKvPool,
        layer: usize,
        moves: &[KvMove],
        rope: Option<&Rope>,
    ) {
        let layer = if self.is(Fault::MovesLayerZero) { 0 } else { layer };
        let mut moves = moves.to_vec();
        if self.is(Fault::MovesTheLastFirst) {
            moves.reverse();
        }
        if self.is(Fault::MovesTurnedTheOtherWay) {
            moves.iter_mut().for_each(|one| one.distance = -one.distance);
        }
        if self.is(Fault::MovesRoundAgain) {
            // Off and on again: whoever turns by nothing turns all the same.
            for KvMove { from, to, distance } in &mut moves {
                if *distance == 0 {
                    let away = [KvMove { from: *from, to: *to, distance: 1 }];
                    Reference.kv_move(pool, layer, &away, rope);
                    (*from, *distance) = (*to, -1);
                }
            }
        }
        if self.is(Fault::MovesNothing) {
            moves.clear();
        }
        if self.is(Fault::MovesOneLess) {
            moves.pop();
        }
        let rope = rope.filter(|_| !self.is(Fault::MovesUnturned));
        Reference.kv_move(pool, layer, &moves, rope);
    }

    fn kv_page_bytes(&self, pool: &ReferenceKvPool) -> usize {
        Reference.kv_page_bytes(pool)
    }

    fn kv_read_page(&self, pool: &ReferenceKvPool, page: PageId, bytes: &mut [u8]) {
        if self.is(Fault::ReadsNothingOfAPage) {
            return bytes.fill(0);
        }
        let other = u32::from(self.is(Fault::ReadsAnotherPage) && page.0 == 8);
        Reference.kv_read_page(pool, PageId(page.0 - other), bytes);
    }

    fn kv_write_page(&self, pool: &mut ReferenceKvPool, page: PageId, bytes: &[u8]) {
        if self.is(Fault::WritesNoPage) {
            return;
        }
        let mut written = bytes.to_vec();
        if self.is(Fault::WritesHalfAPage) {
            Reference.kv_read_page(pool, page, &mut written);
            let half = bytes.len() / 2;
            written[..half].copy_from_slice(&bytes[..half]);
        }
        if self.is(Fault::WritesBesideThePage) {
            Reference.kv_write_page(pool, PageId(page.0 - 1), bytes);
        }
        Reference.kv_write_page(pool, page, &written);
    }

    fn embed(&self, table: &ReferenceWeight, ids: &[TokenId], scale: f32, out: &mut Vec<f32>) {
        let (rows, _) = Reference.weight_shape(table);
        let shift = u32::from(self.is(Fault::EmbedsNextRow));
        let ids: Vec<TokenId> =
            ids.iter().map(|id| TokenId((id.0 + shift) % rows as u32)).collect();
        let scale = if self.is(Fault::EmbedsUnscaled) { 1.0 } else { scale };
        Reference.embed(table, &ids, scale, out);
    }

    fn embed_found(&self, table: &ReferenceWeight, found: &Answer, scale: f32, out: &mut Vec<f32>) {
        let scale = if self.is(Fault::EmbedsFoundUnscaled) { 1.0 } else { scale };
        Reference.embed_found(table, &self.found(found), scale, out);
    }

    fn largest(&self, x: &Vec<f32>, n_rows: usize, width: usize, limit: usize) -> Answer {
        self.answer(Reference.largest(x, n_rows, width, limit))
    }

    fn draw(&self, x: &mut Vec<f32>, width: usize, draws: Draws<'_>) -> Answer {
        let (first, mut rows) = (draws.rows[0].numerator, draws.rows.to_vec());
        for draw in &mut rows {
            let Draw { temperature, top_k, top_p, min_p, numerator } = *draw;
            let at_one = self.is(Fault::DrawsAtOneTemperature) && !draw.is_greedy();
            let largest = self.is(Fault::DrawsTheLargest);
            let temperature = if at_one { 1.0 } else { temperature };
            *draw = Draw {
                temperature: if largest { 0.0 } else { temperature },
                top_k: if self.is(Fault::DrawsWithoutTopK) { 0 } else { top_k },
                top_p: if self.is(Fault::DrawsWithoutTopP) { 1.0 } else { top_p },
                min_p: if self.is(Fault::DrawsWithoutMinP) { 0.0 } else { min_p },
                numerator: if self.is(Fault::DrawsByOneNumber) { first } else { numerator },
            };
        }
        if self.is(Fault::DrawsBesideNan) {
            x.iter_mut().filter(|x| !x.is_finite()).for_each(|x| *x = -1e30);
        }
        if self.is(Fault::DrawsInOrderOfWeight) {
            return self.answer(in_order_of_weight(x, width, Draws { rows: &rows, ..draws }));
        }
        let beyond = self.is(Fault::DrawsBeyondTheLimit);
        let limit = if beyond { width } else { draws.limit };
        self.answer(Reference.draw(x, width, Draws { limit, rows: &rows }))
    }

    fn found(&self, found: &Answer) -> Vec<Largest> {
        found.lock().expect("nothing panics with it").clone()
    }

    fn norm(
        &self,
        kind: NormKind,
        x: &Vec<f32>,
        n_rows: usize,
        weight: &Vec<f32>,
        eps: f32,
        out: &mut Vec<f32>,
    ) {
        let eps = if self.is(Fault::NormWithoutEps) { 1e-30 } else { eps };
        let kind = if self.is(Fault::NormIsAlwaysRms) { NormKind::Rms } else { kind };
        Reference.norm(kind, x, n_rows, weight, eps, out);
        if self.is(Fault::WritesTheTail)
            && let Some(last) = out.last_mut()
            && last.is_nan()
        {
            *last = 0.0;
        }
    }

    fn norm_in_place(
        &self,
        kind: NormKind,
        x: &mut Vec<f32>,
        n_rows: usize,
        weight: &Vec<f32>,
        eps: f32,
    ) {
        let n_rows = if self.is(Fault::NormInPlaceOfOneRow) { 1 } else { n_rows };
        Reference.norm_in_place(kind, x, n_rows, weight, eps);
    }

    fn norm_add(
        &self,
        kind: NormKind,
        x: &Vec<f32>,
        n_rows: usize,
        weight: &Vec<f32>,
        eps: f32,
        y: &mut Vec<f32>,
    ) {
        if self.is(Fault::NormAddOverwrites) {
            return Reference.norm(kind, x, n_rows, weight, eps, y);
        }
        Reference.norm_add(kind, x, n_rows, weight, eps, y);
    }

    fn layer_norm(
        &self,
        x: &mut Vec<f32>,
        n_rows: usize,
        weight: &Vec<f32>,
        bias: &Vec<f32>,
        eps: f32,
    ) {
        let n = weight.len() as f32;
        Reference.layer_norm(x, n_rows, weight, bias, eps);
        if self.is(Fault::LayerNormUnbiased) {
            for (i, x) in x.iter_mut().enumerate() {
                let bias = bias[i % bias.len()];
                *x = (*x - bias) * ((n - 1.0) / n).sqrt() + bias;
            }
        }
    }

    fn linear(
        &self,
        x: &Vec<f32>,
        n_rows: usize,
        weight: &ReferenceWeight,
        bias: Option<&Vec<f32>>,
        out: &mut Vec<f32>,
    ) {
        let bias = bias.filter(|_| !self.is(Fault::LinearDropsBias));
        let skipped = self.is(Fault::LinearSkipsLastRow) && n_rows > 1;
        Reference.linear(
            &self.activations(x, weight),
            n_rows - usize::from(skipped),
            weight,
            bias,
            out,
        );
    }

    fn linear_largest(
        &self,
        x: &Vec<f32>,
        n_rows: usize,
        weight: &ReferenceWeight,
        limit: usize,
        work: &mut Vec<f32>,
    ) -> Answer {
        let (n_outputs, _) = Reference.weight_shape(weight);
        let limit = if self.is(Fault::LargestBeyondTheLimit) { n_outputs } else { limit };
        self.linear(x, n_rows, weight, None, work);
        self.largest(work, n_rows, n_outputs, limit)
    }

    fn linear_qkv(
        &self,
        x: &Vec<f32>,
        n_rows: usize,
        weights: [&ReferenceWeight; 3],
        biases: Option<[&Vec<f32>; 3]>,
        outs: [&mut Vec<f32>; 3],
    ) {
        let biases = biases.filter(|_| !self.is(Fault::QkvDropsBiases));
        Reference.linear_qkv(&self.activations(x, weights[0]), n_rows, weights, biases, outs);
    }

    fn linear_add(
        &self,
        x: &Vec<f32>,
        n_rows: usize,
        weight: &ReferenceWeight,
        bias: Option<&Vec<f32>>,
        scale: f32,
        y: &mut Vec<f32>,
    ) {
        let x = self.activations(x, weight);
        let scale = if self.is(Fault::LinearAddUnscaled) { 1.0 } else { scale };
        if self.is(Fault::LinearAddOverwrites) {
            Reference.linear(&x, n_rows, weight, bias, y);
        } else {
            Reference.linear_add(&x, n_rows, weight, bias, scale, y);
        }
    }

    fn linear_add_rows(
        &self,
        x: &Vec<f32>,
        weight: &ReferenceWeight,
        rows: &[u32],
        scales: &[f32],
        y: &mut Vec<f32>,
    ) {
        let mut rows = rows.to_vec();
        let mut scales = scales.to_vec();
        if self.is(Fault::AddsRowsInOrder) {
            rows.sort_unstable();
        }
        if self.is(Fault::AddsRowsWithOneScale) && rows.len() > 1 {
            let last = scales[rows.len() - 1];
            scales.fill(last);
        }
        if self.is(Fault::AddsRowsUnscaled) {
            scales.fill(1.0);
        }
        Reference.linear_add_rows(&self.activations(x, weight), weight, &rows, &scales, y);
    }

    fn linear_gate(
        &self,
        x: &Vec<f32>,
        n_rows: usize,
        gate: &ReferenceWeight,
        up: &ReferenceWeight,
        activation: GateActivation,
        out: &mut Vec<f32>,
    ) {
        let (gate, up) = if self.is(Fault::GateSwapsUp) { (up, gate) } else { (gate, up) };
        let silu = self.is(Fault::GateIsAlwaysSilu);
        let activation = if silu { GateActivation::Silu } else { activation };
        Reference.linear_gate(&self.activations(x, gate), n_rows, gate, up, activation, out);
    }

    fn norm_qkv(
        &self,
        x: Normed<'_, Vec<f32>>,
        weights: [&ReferenceWeight; 3],
        biases: Option<[&Vec<f32>; 3]>,
        outs: [&mut Vec<f32>; 3],
    ) {
        if self.is(Fault::QkvUnnormed) {
            return self.linear_qkv(x.x, x.n_rows, weights, biases, outs);
        }
        Reference.norm_qkv(x, weights, biases, outs);
    }

    fn norm_gate(
        &self,
        x: Normed<'_, Vec<f32>>,
        gate: &ReferenceWeight,
        up: &ReferenceWeight,
        activation: GateActivation,
        out: &mut Vec<f32>,
    ) {
        if self.is(Fault::GateUnnormed) {
            return self.linear_gate(x.x, x.n_rows, gate, up, activation, out);
        }
        Reference.norm_gate(x, gate, up, activation, out);
    }

    fn norm_linear(&self, x: Normed<'_, Vec<f32>>, weight: &ReferenceWeight, out: &mut Vec<f32>) {
        if self.is(Fault::LogitsUnnormed) {
            return self.linear(x.x, x.n_rows, weight, None, out);
        }
        Reference.norm_linear(x, weight, out);
    }

    fn norm_largest(
        &self,
        x: Normed<'_, Vec<f32>>,
        weight: &ReferenceWeight,
        limit: usize,
        work: &mut Vec<f32>,
    ) -> Answer {
        if self.is(Fault::LargestUnnormed) {
            return self.linear_largest(x.x, x.n_rows, weight, limit, work);
        }
        self.answer(Reference.norm_largest(x, weight, limit, work))
    }

    fn norm_draw(
        &self,
        x: Normed<'_, Vec<f32>>,
        weight: &ReferenceWeight,
        draws: Draws<'_>,
        work: &mut Vec<f32>,
    ) -> Answer {
        if self.is(Fault::DrawUnnormed) {
            self.linear(x.x, x.n_rows, weight, None, work);
            return self.draw(work, weight_rows(weight), draws);
        }
        self.answer(Reference.norm_draw(x, weight, draws, work))
    }

    fn place_heads(
        &self,
        mut heads: HeadRows<'_, Vec<f32>>,
        positions: &[u32],
        pool: &mut ReferenceKvPool,
        layer: usize,
        slots: &[KvSlot],
    ) {
        heads.norms = heads.norms.filter(|_| !self.is(Fault::PlacesUnnormed));
        heads.rope = heads.rope.filter(|_| !self.is(Fault::PlacesUnrotated));
        Reference.place_heads(heads, positions, pool, layer, slots);
    }

    fn norm_place(
        &self,
        x: Normed<'_, Vec<f32>>,
        weights: [&ReferenceWeight; 3],
        biases: Option<[&Vec<f32>; 3]>,
        mut heads: HeadRows<'_, Vec<f32>>,
        places: Places<'_, ReferenceKvPool>,
    ) {
        heads.rope = heads.rope.filter(|_| !self.is(Fault::NormPlacesUnrotated));
        let biases = biases.filter(|_| !self.is(Fault::NormPlacesWithoutBiases));
        if !self.is(Fault::NormPlacesUnnormed) {
            return Reference.norm_place(x, weights, biases, heads, places);
        }
        let outs = [&mut *heads.queries, &mut *heads.keys, &mut *heads.values];
        Reference.linear_qkv(x.x, x.n_rows, weights, biases, outs);
        let Places { pool, layer, positions, slots } = places;
        Reference.place_heads(heads, positions, pool, layer, slots);
    }

    fn linear_gelu(
        &self,
        x: &Vec<f32>,
        n_rows: usize,
        weight: &ReferenceWeight,
        bias: &Vec<f32>,
        out: &mut Vec<f32>,
    ) {
        if !self.is(Fault::GeluByTanh) {
            return Reference.linear_gelu(&self.activations(x, weight), n_rows, weight, bias, out);
        }
        Reference.linear(&self.activations(x, weight), n_rows, weight, Some(bias), out);
        for x in out.iter_mut() {
            let inner = (2.0 / std::f32::consts::PI).sqrt() * (*x + 0.044_715 * x.powi(3));
            *x *= 0.5 * (1.0 + inner.tanh());
        }
    }

    fn rope(
        &self,
        x: &mut Vec<f32>,
        n_heads: usize,
        head_dim: usize,
        positions: &[u32],
        rope: &Rope,
    ) {
        let style = match (self.is(Fault::RopeOtherStyle), rope.style) {
            (false, style) => style,
            (true, RopeStyle::Halves) => RopeStyle::Interleaved,
            (true, RopeStyle::Interleaved) => RopeStyle::Halves,
        };
        let inverse_frequencies = rope.inverse_frequencies.clone();
        let start = if self.is(Fault::RopeFromZero) { positions[0] } else { 0 };
        let positions: Vec<u32> = positions.iter().map(|p| p.saturating_sub(start)).collect();
        let magnitude = if self.is(Fault::RopeWithoutMagnitude) { 1.0 } else { rope.magnitude };
        let rope = Rope { inverse_frequencies, style, magnitude };
        Reference.rope(x, n_heads, head_dim, &positions, &rope);
    }

    fn kv_write(
        &self,
        pool: &mut ReferenceKvPool,
        layer: usize,
        k: &Vec<f32>,
        v: &Vec<f32>,
        slots: &[KvSlot],
    ) {
        let layer = if self.is(Fault::WritesLayerZero) { 0 } else { layer };
        Reference.kv_write(pool, layer, k, v, slots);
    }

    fn attention(
        &self,
        q: &Vec<f32>,
        pool: &ReferenceKvPool,
        layer: usize,
        shape: AttentionShape,
        spans: &[AttentionSpan<'_>],
        out: &mut Vec<f32>,
    ) {
        let scale = if self.is(Fault::IgnoresTheScale) { 1.0 } else { shape.scale };
        let soft_cap = shape.soft_cap.filter(|_| !self.is(Fault::IgnoresTheCap));
        let longer = usize::from(self.is(Fault::WindowOneLonger));
        let shorter = usize::from(self.is(Fault::WindowOneShorter));
        let window = shape.window.map(|keys| (keys + longer - shorter).max(1));
        let shape = AttentionShape { scale, soft_cap, window, ..shape };
        let in_order: Vec<PageId> = (0..3).map(PageId).collect();
        let spans: Vec<AttentionSpan<'_>> = spans
            .iter()
            .map(|&span| {
                let room = (span.first_position + span.n_rows) % PAGE_TOKENS != 0;
                let ahead = usize::from(self.is(Fault::SeesTheFuture) && room);
                let ignored = self.is(Fault::IgnoresThePageTable);
                let pages = if ignored { &in_order } else { span.pages };
                AttentionSpan { first_position: span.first_position + ahead, pages, ..span }
            })
            .collect();
        if !self.is(Fault::WrongGroup) {
            return Reference.attention(q, pool, layer, shape, &spans, out);
        }
        // Head h reads head h mod K instead of h / (H / K): put it where the reference does that.
        let AttentionShape { n_heads, n_kv_heads, head_dim, .. } = shape;
        let place = |h: usize| (h % n_kv_heads) * (n_heads / n_kv_heads) + h / n_kv_heads;
        let n_rows = spans.iter().map(|s| s.first_row + s.n_rows).max().unwrap_or(0);
        let moves = (0..n_rows * n_heads).map(|i| {
            let (row, h) = (i / n_heads, i % n_heads);
            (i * head_dim, (row * n_heads + place(h)) * head_dim)
        });
        let mut moved = vec![0.0; n_rows * n_heads * head_dim];
        for (from, to) in moves.clone() {
            moved[to..to + head_dim].copy_from_slice(&q[from..from + head_dim]);
        }
        let mut attended = moved.clone();
        Reference.attention(&moved, pool, layer, shape, &spans, &mut attended);
        for (to, from) in moves {
            out[to..to + head_dim].copy_from_slice(&attended[from..from + head_dim]);
        }
    }

    fn attention_full(
        &self,
        q: &Vec<f32>,
        k: &Vec<f32>,
        v: &Vec<f32>,
        shape: AttentionShape,
        spans: &[Span],
        out: &mut Vec<f32>,
    ) {
        if self.is(Fault::JoinsSpans) {
            let n_rows = spans.iter().map(|s| s.first_row + s.n_rows).max().unwrap_or(0);
            let all = Span { first_row: 0, n_rows };
            return Reference.attention_full(q, k, v, shape, &[all], out);
        }
        Reference.attention_full(q, k, v, shape, spans, out);
    }

    fn gather_rows(&self, x: &Vec<f32>, width: usize, rows: &[u32], out: &mut Vec<f32>) {
        let rows = if self.is(Fault::GathersFirst) { vec![0; rows.len()] } else { rows.to_vec() };
        Reference.gather_rows(x, width, &rows, out);
    }

    fn add(&self, x: &mut Vec<f32>, y: &Vec<f32>, len: usize) {
        Reference.add(x, y, len - usize::from(self.is(Fault::AddsOneLess)));
    }

    fn scale_and_cap(&self, x: &mut Vec<f32>, len: usize, scale: f32, soft_cap: Option<f32>) {
        let scale = if self.is(Fault::CapsOnly) { 1.0 } else { scale };
        let soft_cap = soft_cap.filter(|_| !self.is(Fault::ScalesOnly));
        Reference.scale_and_cap(x, len, scale, soft_cap);
    }

    fn mean_rows(&self, x: &Vec<f32>, width: usize, spans: &[Span], out: &mut Vec<f32>) {
        Reference.mean_rows(x, width, spans, out);
        if self.is(Fault::MeanIsSum) {
            for (out, span) in out.chunks_mut(width).zip(spans) {
                out.iter_mut().for_each(|x| *x *= span.n_rows as f32);
            }
        }
    }
}
