"""Where the library is used. The library never imports from here."""
