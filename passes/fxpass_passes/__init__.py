"""The passes that ship with fxpass: plugins like any other, one per file, found by their entry points."""
