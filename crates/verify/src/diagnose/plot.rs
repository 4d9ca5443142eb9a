//! Small plots as inline SVG. Colours are CSS variables of the page, so that light and dark come from one place.

use std::fmt::Write as _;

use super::junit::escaped;

const WIDTH: f64 = 640.0;
const HEIGHT: f64 = 250.0;
const LEFT: f64 = 62.0;
const RIGHT: f64 = 14.0;
const TOP: f64 = 16.0;
const BOTTOM: f64 = 44.0;
const TICKS: usize = 5;

/// Points joined by a line.
pub(super) struct Series {
    /// What it shows.
    pub(super) name: String,
    /// (x, y), ascending in x.
    pub(super) points: Vec<(f64, f64)>,
}

/// A level that the reader compares with.
pub(super) struct Level {
    /// What it is.
    pub(super) name: String,
    /// Where it is.
    pub(super) at: f64,
}

/// A plot of lines over one another.
pub(super) struct Lines<'a> {
    /// What it shows, for those who do not see it.
    pub(super) title: &'a str,
    /// Name of the horizontal axis.
    pub(super) x: &'a str,
    /// Name of the vertical axis.
    pub(super) y: &'a str,
    /// The lines.
    pub(super) series: Vec<Series>,
    /// A limit, drawn dashed.
    pub(super) level: Option<Level>,
    /// Whether the vertical axis begins at 0.
    pub(super) from_zero: bool,
}

/// Places on the canvas.
struct Frame {
    x: (f64, f64),
    y: (f64, f64),
}

impl Frame {
    fn at(&self, x: f64, y: f64) -> (f64, f64) {
        let share = |value: f64, (low, high): (f64, f64)| (value - low) / (high - low).max(1e-300);
        let across = LEFT + share(x, self.x) * (WIDTH - LEFT - RIGHT);
        let down = HEIGHT - BOTTOM - share(y, self.y) * (HEIGHT - TOP - BOTTOM);
        (across, down)
    }
}

impl Lines<'_> {
    /// The plot; nothing where there is no point.
    pub(super) fn svg(&self) -> Option<String> {
        let finite = |&(x, y): &(f64, f64)| x.is_finite() && y.is_finite();
        let points: Vec<(f64, f64)> =
            self.series.iter().flat_map(|series| series.points.clone()).filter(finite).collect();
        let (&(first_x, first_y), _) = points.split_first()?;
        let mut frame = Frame { x: (first_x, first_x), y: (first_y, first_y) };
        for &(x, y) in &points {
            frame.x = (frame.x.0.min(x), frame.x.1.max(x));
            frame.y = (frame.y.0.min(y), frame.y.1.max(y));
        }
        if let Some(level) = &self.level {
            frame.y = (frame.y.0.min(level.at), frame.y.1.max(level.at));
        }
        if self.from_zero {
            frame.y.0 = 0.0;
        }
        let margin = 0.08 * (frame.y.1 - frame.y.0).max(frame.y.1.abs() * 1e-3).max(1e-12);
        frame.y.1 += margin;
        if !self.from_zero {
            frame.y.0 -= margin;
        }
        let mut svg = head(self.title);
        axes(&mut svg, &frame, (self.x, self.y));
        if let Some(level) = &self.level {
            let (_, y) = frame.at(frame.x.0, level.at);
            put(
                &mut svg,
                format_args!(
                    "<line class=\"limit\" x1=\"{LEFT}\" x2=\"{:.1}\" y1=\"{y:.1}\" y2=\"{y:.1}\"/>\
                 <text class=\"limit-text\" x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"end\">{}</text>",
                    WIDTH - RIGHT,
                    WIDTH - RIGHT,
                    y - 4.0,
                    escaped(&level.name)
                ),
            );
        }
        for (index, series) in self.series.iter().enumerate() {
            line(&mut svg, &frame, (index, series));
        }
        svg.push_str("</svg>");
        let names: Vec<&str> = self.series.iter().map(|series| series.name.as_str()).collect();
        Some(format!("{}{svg}", legend(&names)))
    }
}

fn line(svg: &mut String, frame: &Frame, (index, series): (usize, &Series)) {
    let points = series.points.iter().filter(|(_, y)| y.is_finite());
    let places: Vec<(f64, f64)> = points.map(|&(x, y)| frame.at(x, y)).collect();
    let path: Vec<String> = places.iter().map(|(x, y)| format!("{x:.1},{y:.1}")).collect();
    put(svg, format_args!("<polyline class=\"line s{index}\" points=\"{}\"/>", path.join(" ")));
    for ((x, y), (at, value)) in places.iter().zip(&series.points) {
        put(
            svg,
            format_args!(
                "<circle class=\"dot s{index}\" cx=\"{x:.1}\" cy=\"{y:.1}\" r=\"2.6\"><title>{}: {} at {}</title></circle>",
                escaped(&series.name),
                number(*value),
                number(*at)
            ),
        );
    }
}

/// A band of an axis.
pub(super) struct Stripe {
    /// Name and CSS class.
    pub(super) name: &'static str,
    /// Where it begins.
    pub(super) from: f64,
    /// Where it ends.
    pub(super) to: f64,
}

/// What a set is called, and its values.
pub(super) type Set<'a> = (&'a str, &'a [f64]);

/// Bins of a distribution on [0, 1].
const BINS: usize = 40;

/// Two sets on [0, 1] as shares in bins: the first above the axis, the second below it.
pub(super) fn two_distributions(
    title: &str,
    x: &str,
    (above, below): (Set<'_>, Set<'_>),
    stripes: &[Stripe],
) -> Option<String> {
    if above.1.is_empty() && below.1.is_empty() {
        return None;
    }
    let (up, down) = (shares(above.1), shares(below.1));
    let most = up.iter().chain(&down).copied().fold(0.02, f64::max);
    let frame = Frame { x: (0.0, 1.0), y: (-most, most) };
    let mut svg = head(title);
    stripes.iter().for_each(|stripe| draw_stripe(&mut svg, &frame, stripe));
    bars(&mut svg, &frame, (0, 1.0, &up));
    bars(&mut svg, &frame, (1, -1.0, &down));
    let (_, middle) = frame.at(0.0, 0.0);
    let percent = 100.0 * most;
    put(
        &mut svg,
        format_args!(
            "<line class=\"axis\" x1=\"{LEFT}\" x2=\"{:.1}\" y1=\"{middle:.1}\" y2=\"{middle:.1}\"/>\
             <text class=\"tick\" x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"end\">{percent:.0} %</text>\
             <text class=\"tick\" x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"end\">{percent:.0} %</text>\
             <text class=\"axis-name\" x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"middle\">{}</text></svg>",
            WIDTH - RIGHT,
            LEFT - 6.0,
            TOP + 8.0,
            LEFT - 6.0,
            HEIGHT - BOTTOM,
            f64::midpoint(LEFT, WIDTH - RIGHT),
            HEIGHT - 8.0,
            escaped(x)
        ),
    );
    let names = [
        format!("{}, n = {}, upwards", above.0, above.1.len()),
        format!("{}, n = {}, downwards", below.0, below.1.len()),
    ];
    Some(format!("{}{svg}", legend(&[&names[0], &names[1]])))
}

/// The share of the values in each bin.
fn shares(values: &[f64]) -> [f64; BINS] {
    let mut bins = [0.0; BINS];
    for &value in values {
        #[expect(
            clippy::cast_possible_truncation,
            clippy::cast_sign_loss,
            reason = "clamped to the bins"
        )]
        let bin = ((value.clamp(0.0, 1.0) * as_f64(BINS)) as usize).min(BINS - 1);
        bins[bin] += 1.0 / as_f64(values.len());
    }
    bins
}

fn draw_stripe(svg: &mut String, frame: &Frame, stripe: &Stripe) {
    let ((x1, y1), (x2, y2)) = (frame.at(stripe.from, frame.y.1), frame.at(stripe.to, frame.y.0));
    put(
        svg,
        format_args!(
            "<rect class=\"band {}\" x=\"{x1:.1}\" y=\"{y1:.1}\" width=\"{:.1}\" height=\"{:.1}\"><title>{}</title></rect>",
            stripe.name.replace(' ', "-"),
            x2 - x1,
            y2 - y1,
            stripe.name
        ),
    );
    if stripe.from > 0.0 {
        put(
            svg,
            format_args!(
                "<line class=\"edge\" x1=\"{x1:.1}\" x2=\"{x1:.1}\" y1=\"{y1:.1}\" y2=\"{y2:.1}\"/>\
                 <text class=\"tick\" x=\"{x1:.1}\" y=\"{:.1}\" text-anchor=\"middle\">{:.2}</text>",
                HEIGHT - BOTTOM + 15.0,
                stripe.from
            ),
        );
    }
    // The name of a narrow band would run into its neighbours'.
    if x2 - x1 > 45.0 {
        put(
            svg,
            format_args!(
                "<text class=\"band-name\" x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"middle\">{}</text>",
                f64::midpoint(x1, x2),
                TOP + 11.0,
                stripe.name
            ),
        );
    }
}

/// The bars of one set, on its side of the axis.
fn bars(svg: &mut String, frame: &Frame, (index, sign, bins): (usize, f64, &[f64; BINS])) {
    let width = 1.0 / as_f64(BINS);
    for (bin, &share) in bins.iter().enumerate().filter(|(_, share)| **share > 0.0) {
        let left = as_f64(bin) * width;
        let ((x1, y1), (x2, y2)) = (frame.at(left, share * sign), frame.at(left + width, 0.0));
        put(
            svg,
            format_args!(
                "<rect class=\"bar s{index}\" x=\"{:.1}\" y=\"{:.1}\" width=\"{:.1}\" height=\"{:.1}\"><title>{:.0} % from {left:.3}</title></rect>",
                x1 + 0.5,
                y1.min(y2),
                x2 - x1 - 1.0,
                (y2 - y1).abs(),
                100.0 * share
            ),
        );
    }
}

fn head(title: &str) -> String {
    let title = escaped(title);
    format!(
        "<svg viewBox=\"0 0 {WIDTH} {HEIGHT}\" role=\"img\" aria-label=\"{title}\"><title>{title}</title>"
    )
}

fn axes(svg: &mut String, frame: &Frame, (x_name, y_name): (&str, &str)) {
    for (y, label) in ticks(frame.y) {
        let (_, down) = frame.at(frame.x.0, y);
        put(
            svg,
            format_args!(
                "<line class=\"grid\" x1=\"{LEFT}\" x2=\"{:.1}\" y1=\"{down:.1}\" y2=\"{down:.1}\"/>\
             <text class=\"tick\" x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"end\">{label}</text>",
                WIDTH - RIGHT,
                LEFT - 6.0,
                down + 3.5
            ),
        );
    }
    for (x, label) in ticks(frame.x) {
        let (across, _) = frame.at(x, frame.y.0);
        put(
            svg,
            format_args!(
                "<text class=\"tick\" x=\"{across:.1}\" y=\"{:.1}\" text-anchor=\"middle\">{label}</text>",
                HEIGHT - BOTTOM + 15.0
            ),
        );
    }
    put(
        svg,
        format_args!(
            "<text class=\"axis-name\" x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"middle\">{}</text>\
         <text class=\"axis-name\" transform=\"translate(13 {:.1}) rotate(-90)\" text-anchor=\"middle\">{}</text>",
            f64::midpoint(LEFT, WIDTH - RIGHT),
            HEIGHT - 8.0,
            escaped(x_name),
            f64::midpoint(TOP, HEIGHT - BOTTOM),
            escaped(y_name)
        ),
    );
}

/// Round places of a scale, with their labels: a step of 1, 2 or 5 times a power of ten, about [`TICKS`] of them.
fn ticks((low, high): (f64, f64)) -> Vec<(f64, String)> {
    let least = (high - low) / as_f64(TICKS);
    if !(least > 0.0 && least.is_finite()) {
        return Vec::new();
    }
    let power = least.log10().floor();
    let unit = 10f64.powf(power);
    let times = [1.0, 2.0, 5.0].into_iter().find(|times| times * unit >= least * (1.0 - 1e-9));
    let (step, power) = times.map_or((10.0 * unit, power + 1.0), |times| (times * unit, power));
    let first = (low / step - 1e-9).ceil();
    let places = (0..=2 * TICKS).map(|i| (first + as_f64(i)) * step);
    let within = places.take_while(|&at| at <= high + 1e-9 * step);
    within.map(|at| (at, label(at, power))).collect()
}

/// A place of a scale whose step is a few times `10^power`.
fn label(at: f64, power: f64) -> String {
    // Below zero by what a sum of steps leaves.
    let at = if at.abs() < 10f64.powf(power) / 2.0 { 0.0 } else { at };
    if at == 0.0 {
        "0".to_owned()
    } else if power >= 0.0 {
        format!("{at:.0}")
    } else if power >= -4.0 {
        #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "1 to 4")]
        let decimals = -power as usize;
        format!("{at:.decimals$}")
    } else {
        format!("{at:.0e}")
    }
}

fn legend(names: &[&str]) -> String {
    let entry = |(index, name): (usize, &&str)| {
        format!("<span><i class=\"key s{index}\"></i>{}</span>", escaped(name))
    };
    let entries: Vec<String> = names.iter().enumerate().map(entry).collect();
    format!("<p class=\"legend\">{}</p>", entries.join(" "))
}

/// A number with three digits that count.
pub(super) fn number(value: f64) -> String {
    let size = value.abs();
    if size == 0.0 {
        "0".to_owned()
    } else if size >= 1000.0 {
        format!("{value:.0}")
    } else if size >= 10.0 {
        format!("{value:.1}")
    } else if size >= 0.01 {
        format!("{value:.3}")
    } else {
        format!("{value:.1e}")
    }
}

fn put(svg: &mut String, text: std::fmt::Arguments<'_>) {
    // Writing to a String cannot fail.
    let _infallible = svg.write_fmt(text);
}

#[expect(clippy::cast_precision_loss, reason = "counts are far below 2^52")]
fn as_f64(n: usize) -> f64 {
    n as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    fn labels(scale: (f64, f64)) -> Vec<String> {
        ticks(scale).into_iter().map(|(_, label)| label).collect()
    }

    #[test]
    fn places_of_a_scale_are_round_and_inside() {
        assert_eq!(labels((0.0, 448.0)), ["0", "100", "200", "300", "400"]);
        assert_eq!(labels((512.0, 2048.0)), ["1000", "1500", "2000"]);
        assert_eq!(labels((0.0, 0.011)), ["0", "0.005", "0.010"]);
        assert_eq!(labels((-1.0, 1.0)), ["-1.0", "-0.5", "0", "0.5", "1.0"]);
        assert_eq!(labels((0.0, 3e-7)), ["0", "1e-7", "2e-7", "3e-7"]);
        assert_eq!(labels((1.0, 1.0)), Vec::<String>::new());
        assert_eq!(labels((0.0, f64::NAN)), Vec::<String>::new());
    }
}
