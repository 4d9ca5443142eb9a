"""Runs the client tests against a real server. A skipped test and an empty run are failures."""

import argparse
import sys
import unittest

import server


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--exrail", required=True, help="the program to test")
    parser.add_argument("--only", default="test_*.py", help="pattern of test files")
    arguments = parser.parse_args()

    server.SERVER = server.Server(arguments.exrail)
    exit_code = None
    try:
        tests = unittest.defaultTestLoader.discover(server.HERE, pattern=arguments.only)
        result = unittest.TextTestRunner(verbosity=2).run(tests)
    finally:
        exit_code = server.SERVER.stop()

    n_bad = len(result.failures) + len(result.errors) + len(result.unexpectedSuccesses)
    n_bad += len(result.skipped)
    n_passed = result.testsRun - n_bad
    if exit_code != 0:
        print(f"exrail serve: expected exit code 0 after SIGTERM, found {exit_code}")
        n_bad += 1
    print(f"client: {max(n_passed, 0)} passed, {n_bad} failed", flush=True)
    sys.exit(0 if n_bad == 0 and n_passed > 0 else 1)


if __name__ == "__main__":
    main()
