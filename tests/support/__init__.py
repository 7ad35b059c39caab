"""What several tests need: servers, made recordings and bundles, the README's commands, injected faults."""
