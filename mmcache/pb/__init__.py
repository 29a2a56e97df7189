"""Generated from proto/mmcache/pb/cache.proto by scripts/generate_pb.py; do not edit by hand."""
