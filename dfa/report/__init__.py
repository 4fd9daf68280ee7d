"""What a person looks at: figures and the HTML page."""
