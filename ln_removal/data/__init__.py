"""Corpora (streams of documents) and the token shards made from them."""
