"""One module per asset: from the members of a package to files that FlexP reads."""
