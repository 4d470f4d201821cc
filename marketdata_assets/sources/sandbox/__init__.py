"""The sandbox exchange: synthetic markets behind Binance's API on loopback."""
