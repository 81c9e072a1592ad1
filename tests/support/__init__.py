"""What tests use: servers, clients, doubles, guards. No tests in here.

tests/ is on sys.path while tests run (pyproject.toml), so that every test says
`from support.cli import Command`, wherever it lies, and those in tests/proof `from proof.tree import Tree`.
No test file imports another one: what two of them need lies here.
"""
