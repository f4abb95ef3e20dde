"""Files and folders that runs leave. Knows neither torch nor transformers."""
