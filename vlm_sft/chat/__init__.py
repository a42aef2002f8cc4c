"""A conversation becomes a batch with proven labels: messages, chat template, images, collator, packing, audit."""
