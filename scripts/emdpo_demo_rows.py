import moved

moved.run(__name__, __file__)
