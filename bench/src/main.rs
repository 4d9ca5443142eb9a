//! `exrail-bench`: what must be measured on a real machine and cannot be a unit test.
//!
//! `cpu` compares `exrail bench` with llama.cpp's own programs on the same files; `soak` drives a server with
//! many clients that hang up at random. Both print a table and write a record. Neither is part of
//! the product, and nothing depends on this crate.

mod cpu;
mod machine;
mod random;
mod record;
mod soak;

use std::{
    io::{self, Write},
    process::ExitCode,
};

use clap::{Parser, Subcommand};

#[derive(Debug, Parser)]
#[command(name = "exrail-bench", about = "Speed against llama.cpp, and the soak of a server")]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Compare speed, load time and memory with llama.cpp, in turns
    Cpu(cpu::CpuArguments),
    /// Drive a server with many clients that cancel at random
    Soak(soak::SoakArguments),
}

/// Exit codes: 0 done and passed, 1 error, 3 a gate does not pass.
fn main() -> ExitCode {
    let result = match Arguments::parse().command {
        Command::Cpu(arguments) => cpu::run(&arguments).map(|verdict| match verdict {
            cpu::Verdict::Pass => ExitCode::SUCCESS,
            cpu::Verdict::Fail => ExitCode::from(3),
        }),
        Command::Soak(arguments) => soak::run(&arguments).map(|()| ExitCode::SUCCESS),
    };
    result.unwrap_or_else(|error| {
        let _ignored = writeln!(io::stderr(), "exrail-bench: {error:#}");
        ExitCode::FAILURE
    })
}
