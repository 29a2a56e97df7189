"""vLLM: the KV connector. `--kv-transfer-config` names this module and MMCacheKVConnector; docs/vllm.md has the flag."""
