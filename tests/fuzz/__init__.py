"""A fuzzer of whole models: composes them out of the rule table, grows them at random, and judges by itself.

``python -m tests.fuzz --help``; docs/testing.md says how to read what it finds.
"""
