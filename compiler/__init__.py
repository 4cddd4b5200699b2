"""The compiler: capture -> IR -> passes -> code generation. See docs/architecture.md."""
