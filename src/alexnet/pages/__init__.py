"""What a person looks at: the figures of matplotlib, and the HTML pages that open without a network."""
