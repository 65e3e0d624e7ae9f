"""Answer questions about an order: forecasts, exposures, portable documents."""
