"""The static-batch engine: fed groups of requests in, completions out."""
