"""What is known of the share prices in the package vega_datasets: names, symbols, range. Data only.

Source: its file `stocks.csv`, 560 monthly prices (first of each month, US dollars) of five US shares.
"""

SOURCE = "vega_datasets"

# Symbol → what a question may call it; the first is how reports call it. Google was listed in August 2004.
NAMES: dict[str, tuple[str, ...]] = {
    "AAPL": ("Apple", "AAPL"),
    "AMZN": ("Amazon", "AMZN"),
    "GOOG": ("Google", "Alphabet", "GOOG", "GOOGL"),
    "IBM": ("IBM", "International Business Machines"),
    "MSFT": ("Microsoft", "MSFT"),
}

FIRST = "2000-01"  # months of the first and the last price
LAST = "2010-03"


def name_of(ticker: str) -> str:
    """Return how a reader knows the share: "Apple" for "AAPL", the symbol itself for an unknown one."""
    return NAMES.get(ticker, (ticker,))[0]
