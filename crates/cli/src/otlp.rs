//! Where spans go: the options of `serve`, and the variables of OpenTelemetry beside them.
//!
//! What asks for something that is not done is refused by name, as an option would be.

use std::time::Duration;

use anyhow::{Context, Result, bail};
use clap::{Args, ValueEnum};
use exrail_server::{OtlpOptions, OtlpProtocol, SpanContent};

use crate::environment as env;

/// `service.name`, where the environment names none.
const SERVICE: &str = "exrail";
/// For one batch, where nobody says otherwise: OpenTelemetry's default.
const TIMEOUT: Duration = Duration::from_secs(10);

/// How spans are sent.
#[derive(Clone, Debug, Args)]
#[command(next_help_heading = "Spans (OpenTelemetry)")]
pub(crate) struct OtlpArgs {
    /// Send spans of requests to this collector, http://HOST:4318 or, for grpc, http://HOST:4317;
    /// OTEL_EXPORTER_OTLP_ENDPOINT when absent, nowhere without either.
    #[arg(long, value_name = "URL")]
    otlp_endpoint: Option<String>,
    /// How they are sent; OTEL_EXPORTER_OTLP_PROTOCOL when absent, http without either.
    #[arg(long, value_name = "PROTOCOL")]
    otlp_protocol: Option<ProtocolOption>,
    /// Send questions, messages, answers and snippets along; they stay here without it.
    #[arg(long)]
    otlp_content: bool,
}

/// `--otlp-protocol`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum ProtocolOption {
    /// Protocol buffers over HTTP.
    Http,
    /// gRPC.
    Grpc,
}

/// Variables that ask for something which is not done, unless they have one of these values.
const NOT_HONOURED: [(&str, &[&str]); 17] = [
    ("OTEL_EXPORTER_OTLP_CERTIFICATE", &[]),
    ("OTEL_EXPORTER_OTLP_CLIENT_CERTIFICATE", &[]),
    ("OTEL_EXPORTER_OTLP_CLIENT_KEY", &[]),
    ("OTEL_EXPORTER_OTLP_COMPRESSION", &["none"]),
    ("OTEL_EXPORTER_OTLP_TRACES_CERTIFICATE", &[]),
    ("OTEL_EXPORTER_OTLP_TRACES_CLIENT_CERTIFICATE", &[]),
    ("OTEL_EXPORTER_OTLP_TRACES_CLIENT_KEY", &[]),
    ("OTEL_EXPORTER_OTLP_TRACES_COMPRESSION", &["none"]),
    ("OTEL_BSP_EXPORT_TIMEOUT", &[]),
    ("OTEL_BSP_MAX_EXPORT_BATCH_SIZE", &[]),
    ("OTEL_BSP_MAX_QUEUE_SIZE", &[]),
    ("OTEL_BSP_SCHEDULE_DELAY", &[]),
    ("OTEL_PROPAGATORS", &["tracecontext", "tracecontext,baggage"]),
    ("OTEL_SPAN_ATTRIBUTE_COUNT_LIMIT", &[]),
    ("OTEL_SPAN_ATTRIBUTE_VALUE_LENGTH_LIMIT", &[]),
    ("OTEL_TRACES_SAMPLER", &["parentbased_always_on"]),
    ("OTEL_TRACES_SAMPLER_ARG", &[]),
];

impl OtlpArgs {
    /// What is asked for, by options and by the environment; none: spans are not sent.
    pub(crate) fn options(&self) -> Result<Option<OtlpOptions>> {
        self.resolve(|name| match std::env::var_os(name) {
            None => Ok(None),
            Some(value) => {
                let value = value.to_str().with_context(|| format!("{name}: expected UTF-8"))?;
                // An empty one is as good as none, says OpenTelemetry.
                Ok(Some(value.to_owned()).filter(|value| !value.is_empty()))
            }
        })
    }

    fn resolve(
        &self,
        read: impl Fn(&'static str) -> Result<Option<String>>,
    ) -> Result<Option<OtlpOptions>> {
        let Some((endpoint, is_whole)) = self.endpoint(&read)? else {
            if self.otlp_protocol.is_some() || self.otlp_content {
                bail!("expected --otlp-endpoint or {}, found neither", env::OTEL_ENDPOINT);
            }
            return Ok(None);
        };
        if self.is_switched_off(&read)? {
            return Ok(None);
        }
        for (name, honoured) in NOT_HONOURED {
            if let Some(value) = read(name)?.filter(|value| !honoured.contains(&value.as_str())) {
                bail!("environment: {name} is not honoured, found `{value}`; unset it");
            }
        }
        check_headers(&read)?;
        let protocol = self.protocol(&read)?;
        Ok(Some(OtlpOptions {
            endpoint: whole(&endpoint, protocol, is_whole)?,
            protocol,
            timeout: timeout(&read)?,
            content: if self.otlp_content { SpanContent::Send } else { SpanContent::Keep },
            service_name: read(env::OTEL_SERVICE_NAME)?.unwrap_or_else(|| SERVICE.into()),
        }))
    }

    /// Where to, and whether that is the whole address.
    fn endpoint(
        &self,
        read: &impl Fn(&'static str) -> Result<Option<String>>,
    ) -> Result<Option<(String, bool)>> {
        if let Some(given) = &self.otlp_endpoint {
            return Ok(Some((given.clone(), false)));
        }
        if let Some(found) = read(env::OTEL_TRACES_ENDPOINT)? {
            return Ok(Some((found, true)));
        }
        Ok(read(env::OTEL_ENDPOINT)?.map(|found| (found, false)))
    }

    /// Whether the environment wants no spans. An option that does is a contradiction.
    fn is_switched_off(
        &self,
        read: &impl Fn(&'static str) -> Result<Option<String>>,
    ) -> Result<bool> {
        let disabled = read(env::OTEL_DISABLED)?.filter(|it| it.eq_ignore_ascii_case("true"));
        let disabled = disabled.map(|_| env::OTEL_DISABLED);
        let exporter = match read(env::OTEL_TRACES_EXPORTER)?.as_deref() {
            None | Some("otlp") => None,
            Some("none") => Some(env::OTEL_TRACES_EXPORTER),
            Some(found) => {
                bail!("{}: expected otlp or none, found `{found}`", env::OTEL_TRACES_EXPORTER)
            }
        };
        match (disabled.or(exporter), &self.otlp_endpoint) {
            (Some(name), Some(_)) => {
                bail!("expected {name} or --otlp-endpoint, found both; unset {name}")
            }
            (switched_off, _) => Ok(switched_off.is_some()),
        }
    }

    fn protocol(
        &self,
        read: &impl Fn(&'static str) -> Result<Option<String>>,
    ) -> Result<OtlpProtocol> {
        match self.otlp_protocol {
            Some(ProtocolOption::Http) => return Ok(OtlpProtocol::Http),
            Some(ProtocolOption::Grpc) => return Ok(OtlpProtocol::Grpc),
            None => {}
        }
        for name in [env::OTEL_TRACES_PROTOCOL, env::OTEL_PROTOCOL] {
            match read(name)?.as_deref() {
                None => {}
                Some("http/protobuf") => return Ok(OtlpProtocol::Http),
                Some("grpc") => return Ok(OtlpProtocol::Grpc),
                Some(found) => bail!("{name}: expected http/protobuf or grpc, found `{found}`"),
            }
        }
        Ok(OtlpProtocol::Http)
    }
}

/// The whole address that requests go to. A name and a password in it would be read back with the configuration.
fn whole(endpoint: &str, protocol: OtlpProtocol, is_whole: bool) -> Result<String> {
    let expected = "expected http://HOST:PORT or https://HOST:PORT";
    let rest = ["http://", "https://"].iter().find_map(|scheme| endpoint.strip_prefix(scheme));
    let Some(authority) = rest.and_then(|rest| rest.split(['/', '?', '#']).next()) else {
        bail!("OTLP endpoint: {expected}, found `{endpoint}`");
    };
    if authority.contains('@') {
        let headers = env::OTEL_HEADERS;
        bail!("OTLP endpoint: {expected}, found a user in it; what it needs goes into {headers}");
    }
    if authority.is_empty() || endpoint.contains(['?', '#', ' ']) {
        bail!("OTLP endpoint: {expected}, found `{endpoint}`");
    }
    let base = endpoint.trim_end_matches('/');
    Ok(match protocol {
        OtlpProtocol::Grpc => base.into(),
        OtlpProtocol::Http if is_whole => endpoint.into(),
        OtlpProtocol::Http if base.ends_with("/v1/traces") => base.into(),
        OtlpProtocol::Http => format!("{base}/v1/traces"),
    })
}

fn timeout(read: &impl Fn(&'static str) -> Result<Option<String>>) -> Result<Duration> {
    for name in [env::OTEL_TRACES_TIMEOUT, env::OTEL_TIMEOUT] {
        let Some(found) = read(name)? else { continue };
        return match found.parse::<u64>() {
            Ok(ms @ 1..) => Ok(Duration::from_millis(ms)),
            Ok(0) | Err(_) => bail!("{name}: expected milliseconds above 0, found `{found}`"),
        };
    }
    Ok(TIMEOUT)
}

/// The exporter reads them itself, and leaves out what it cannot read. Values are never told.
fn check_headers(read: &impl Fn(&'static str) -> Result<Option<String>>) -> Result<()> {
    for name in [env::OTEL_TRACES_HEADERS, env::OTEL_HEADERS] {
        for (at, pair) in read(name)?.iter().flat_map(|all| all.split(',')).enumerate() {
            let key = pair.split_once('=').map_or("", |(key, _)| key.trim());
            let is_token = |byte: u8| byte.is_ascii_alphanumeric() || b"-_.".contains(&byte);
            if !pair.trim().is_empty() && (key.is_empty() || !key.bytes().all(is_token)) {
                bail!("{name}: expected KEY=VALUE, found something else as number {}", at + 1);
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOTHING: OtlpArgs =
        OtlpArgs { otlp_endpoint: None, otlp_protocol: None, otlp_content: false };

    fn to(endpoint: &str) -> OtlpArgs {
        OtlpArgs { otlp_endpoint: Some(endpoint.into()), ..NOTHING }
    }

    /// With these variables.
    fn resolved(args: &OtlpArgs, variables: &[(&str, &str)]) -> Result<Option<OtlpOptions>> {
        args.resolve(|name| {
            let found = variables.iter().find(|(variable, _)| *variable == name);
            Ok(found.map(|(_, value)| (*value).to_owned()))
        })
    }

    fn endpoint(args: &OtlpArgs, variables: &[(&str, &str)]) -> String {
        resolved(args, variables).unwrap().unwrap().endpoint
    }

    fn refused(args: &OtlpArgs, variables: &[(&str, &str)]) -> String {
        resolved(args, variables).unwrap_err().to_string()
    }

    #[test]
    fn without_an_endpoint_nothing_is_sent() {
        assert!(resolved(&NOTHING, &[]).unwrap().is_none());
        // Of no use alone, but of no harm.
        assert!(resolved(&NOTHING, &[(env::OTEL_SERVICE_NAME, "shop")]).unwrap().is_none());
        let alone = OtlpArgs { otlp_content: true, ..NOTHING };
        assert!(refused(&alone, &[]).contains("--otlp-endpoint"));
        let alone = OtlpArgs { otlp_protocol: Some(ProtocolOption::Grpc), ..NOTHING };
        assert!(refused(&alone, &[]).contains("--otlp-endpoint"));
    }

    #[test]
    fn an_option_wins_over_the_environment_and_the_nearer_variable_over_the_general_one() {
        let general = (env::OTEL_ENDPOINT, "http://general:4318");
        let nearer = (env::OTEL_TRACES_ENDPOINT, "http://nearer:4318/spans");
        assert_eq!(endpoint(&NOTHING, &[general]), "http://general:4318/v1/traces");
        assert_eq!(endpoint(&NOTHING, &[general, nearer]), "http://nearer:4318/spans");
        let option = to("http://option:4318/");
        assert_eq!(endpoint(&option, &[general, nearer]), "http://option:4318/v1/traces");
        let whole = to("https://option/api/v1/traces");
        assert_eq!(endpoint(&whole, &[]), "https://option/api/v1/traces");
        let grpc = OtlpArgs { otlp_protocol: Some(ProtocolOption::Grpc), ..option };
        assert_eq!(endpoint(&grpc, &[]), "http://option:4318");
    }

    #[test]
    fn names_and_numbers_of_the_environment_are_taken() {
        let found = resolved(
            &to("http://localhost:4317"),
            &[
                (env::OTEL_PROTOCOL, "grpc"),
                (env::OTEL_SERVICE_NAME, "shop"),
                (env::OTEL_TIMEOUT, "2500"),
                (env::OTEL_HEADERS, "x-api-key=secret, other=a%20b"),
                ("OTEL_TRACES_SAMPLER", "parentbased_always_on"),
            ],
        );
        let found = found.unwrap().unwrap();
        assert_eq!(found.protocol, OtlpProtocol::Grpc);
        assert_eq!(found.service_name, "shop");
        assert_eq!(found.timeout, Duration::from_millis(2500));
        assert_eq!(found.content, SpanContent::Keep);
    }

    #[test]
    fn the_environment_can_switch_spans_off_but_not_against_an_option() {
        let general = (env::OTEL_ENDPOINT, "http://general:4318");
        for off in [(env::OTEL_DISABLED, "true"), (env::OTEL_TRACES_EXPORTER, "none")] {
            assert!(resolved(&NOTHING, &[general, off]).unwrap().is_none());
            assert!(refused(&to("http://localhost:4318"), &[off]).contains(off.0));
        }
    }

    #[test]
    fn what_is_not_done_is_refused_by_its_name() {
        let args = to("http://localhost:4318");
        for (name, honoured) in NOT_HONOURED {
            assert!(refused(&args, &[(name, "something else")]).contains(name));
            for value in honoured {
                assert!(resolved(&args, &[(name, value)]).unwrap().is_some(), "{name}={value}");
            }
        }
        for (name, value) in [
            (env::OTEL_PROTOCOL, "http/json"),
            (env::OTEL_TIMEOUT, "soon"),
            (env::OTEL_TIMEOUT, "0"),
            (env::OTEL_TRACES_EXPORTER, "zipkin"),
        ] {
            assert!(refused(&args, &[(name, value)]).contains(name), "{name}={value}");
        }
        for wrong in ["localhost:4318", "http://", "ftp://a", "http://a/?b", "http:// a"] {
            assert!(refused(&to(wrong), &[]).contains("OTLP endpoint"), "{wrong}");
        }
    }

    #[test]
    fn a_secret_is_never_told() {
        let args = to("http://localhost:4318");
        let told = refused(&args, &[(env::OTEL_HEADERS, "good=1,hunter2")]);
        assert!(told.contains("number 2") && !told.contains("hunter2"), "{told}");
        let told = refused(&to("http://me:hunter2@localhost:4318"), &[]);
        assert!(told.contains(env::OTEL_HEADERS) && !told.contains("hunter2"), "{told}");
    }
}
