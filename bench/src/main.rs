//! `exrail-bench`: what must be measured on a real machine and cannot be a unit test.
//!
//! `cpu` compares `exrail bench` with llama.cpp's own programs on the same files, prints a table and writes a
//! record. `grammar` measures what a mask costs, and `constrained` what an answer under a grammar does. `gateway`
//! measures what the gateway adds to a request. It is no part of the product, and nothing depends on this crate.

mod constrained;
mod cpu;
mod gateway;
mod grammar;
mod machine;
mod record;

use std::{
    io::{self, Write},
    process::ExitCode,
};

use clap::{Parser, Subcommand};

#[derive(Debug, Parser)]
#[command(name = "exrail-bench", about = "Speed against llama.cpp")]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Compare speed, load time and memory with llama.cpp, in turns
    Cpu(cpu::CpuArguments),
    /// Speed of an answer under a grammar beside a free one, in turns
    Constrained(constrained::ConstrainedArguments),
    /// Latency through the gateway beside the same requests without it, in turns
    Gateway(gateway::GatewayArguments),
    /// Processor time of a token's mask, over MaskBench and an answer with citations
    Grammar(grammar::GrammarArguments),
}

/// Exit codes: 0 done and passed, 1 error, 3 a gate does not pass.
fn main() -> ExitCode {
    let result = match Arguments::parse().command {
        Command::Cpu(arguments) => cpu::run(&arguments).map(|verdict| match verdict {
            cpu::Verdict::Pass => ExitCode::SUCCESS,
            cpu::Verdict::Fail => ExitCode::from(3),
        }),
        Command::Constrained(arguments) => constrained::run(&arguments).map(|()| ExitCode::SUCCESS),
        Command::Gateway(arguments) => gateway::run(&arguments).map(|()| ExitCode::SUCCESS),
        Command::Grammar(arguments) => grammar::run(&arguments).map(|()| ExitCode::SUCCESS),
    };
    result.unwrap_or_else(|error| {
        let _ignored = writeln!(io::stderr(), "exrail-bench: {error:#}");
        ExitCode::FAILURE
    })
}
