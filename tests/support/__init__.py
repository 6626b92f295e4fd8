"""Helpers of the tests: small stores, pictures, servers, a browser, child processes."""
