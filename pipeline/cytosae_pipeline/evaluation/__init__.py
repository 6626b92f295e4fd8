"""How good an autoencoder is: measured on a store, whenever it is asked."""
